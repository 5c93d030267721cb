"""Always-on timers and load counters; called by every part of the engine, imports none of them."""
