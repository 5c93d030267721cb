"""Checkpoint weights: every rank reads only the tensors that it owns."""
