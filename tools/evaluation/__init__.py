"""Parts of tools/evaluate.py: tasks of lm-evaluation-harness, one setting after another."""
