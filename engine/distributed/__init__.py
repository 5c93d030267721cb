"""Ranks of one run: launch discovery, rendezvous, process groups, collectives, shared errors."""
