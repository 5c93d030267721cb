"""CUDA graphs of decode steps: whether there are any, their capture, and the steps they run."""
