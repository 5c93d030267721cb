"""The report of a run: totals of all ranks, tables for the terminal, exporters."""
