"""Parts of tools/straggler_report.py: span files in; one page and one trace out."""
