"""Lockstep: expert-parallel MoE inference whose slowest rank is known, and capped.

`import engine` stays light on purpose: what it offers is imported when it is asked for.
"""
