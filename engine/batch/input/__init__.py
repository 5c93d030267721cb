"""The input of a job: which files it is, where its lines are, and how their prompts begin."""
