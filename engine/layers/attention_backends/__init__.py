"""Attention backends: which kernels attend over the paged cache (attention.backend)."""
