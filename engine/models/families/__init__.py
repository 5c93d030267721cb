"""Families: one short file each, which turns a Hugging Face configuration into a `ModelSpec`."""
