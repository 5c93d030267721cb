"""What `tools/soak.py` is made of: faults, the job they hit, and the check of its records."""
