"""Batch jobs: input files to requests, completions to output files, resume after a failure."""
