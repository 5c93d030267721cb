"""Shared parts of tools/capacity_report.py: what a capacity policy costs in quality and saves."""
