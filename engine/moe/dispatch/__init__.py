"""Dispatch and combine: which rows go to which rank, in which chunks and in which format."""
