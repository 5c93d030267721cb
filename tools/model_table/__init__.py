"""The table of model types in docs/models.md: which there are, what the engine makes of each."""
