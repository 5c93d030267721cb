"""Transports that leave row counts on the device: what moves rows out and home without a sync."""
