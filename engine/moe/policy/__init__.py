"""A policy: capacity and placement per layer of one model, and what they are expected to cost."""
