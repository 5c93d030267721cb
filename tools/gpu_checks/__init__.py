"""The checks of tools/gpu_suite.py, one module per subject; each returns a list of `Check`."""
