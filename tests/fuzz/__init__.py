"""Random inputs from a seed: no traceback, no hang, and exit codes of the documented set."""
