"""Steps whose tokens the host reads one step late."""
