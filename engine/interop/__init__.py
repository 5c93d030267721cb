"""Lockstep's capacity for models that other frameworks run; nothing in the engine imports it."""
