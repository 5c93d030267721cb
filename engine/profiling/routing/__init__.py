"""Routing traces: the loads, and on request the claims, of every step of a job, as files.

1. claim_log   Collects the claims of a step's layers while it runs, where they are recorded.
2. recorder    After each step: passes its loads and claims to this rank's files.
3. writer      One file of bounded size: appends, and thins when it is full.
4. trace_file  The format; trace: `read_trace` reads what 3 has written.
"""
