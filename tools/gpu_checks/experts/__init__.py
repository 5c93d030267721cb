"""Checks of the experts: backends, copies, and products on weights in few bits."""
