"""Health of the ranks: heartbeats, the watchdog and the diagnosis of a fault."""
