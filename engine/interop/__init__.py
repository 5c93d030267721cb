"""Lockstep's parts for models that other frameworks run; the engine itself imports none of this."""
