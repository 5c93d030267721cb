"""Parts of tools/capacity_report.py: cost and gain of a capacity policy."""
