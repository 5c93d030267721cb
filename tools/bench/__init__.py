"""Shared parts of the benches in tools/: jobs, workers, interleaving, tables, records."""
