"""Parts of `tools/soak.py`: faults, the job they hit, and the check of its records."""
