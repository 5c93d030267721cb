"""What tools/compile_kernels.py runs: calls, compiler, and the table of results."""
