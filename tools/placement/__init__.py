"""Parts of tools/plan_placement.py: traces, speeds, the heat map."""
