"""Expert capacity: limits per pool, claims on them, and one decision on all ranks."""
