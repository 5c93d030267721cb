"""The checks of tools/gpu_suite.py, one module a subject; each returns a list of `Check`."""
