"""A decoder that transformers builds, on this engine's cache, experts and dispatch."""
