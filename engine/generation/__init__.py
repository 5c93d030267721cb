"""Continuous batching: requests become sequences, steps, sampled tokens and completions.

`loop.py` is the walk-through; `scheduler.py` decides what runs, `runner.py` runs it.
"""
