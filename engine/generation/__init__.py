"""Continuous batching: requests to sequences, steps, sampled tokens and completions."""
