"""Always-on measurements: where each rank's time goes, and which rank the others wait for.

Imports no other part of the engine. One time stamp passes through the files like this:

 1. phase_clock       The layers mark phases; a mark that starts a collective is an arrival.
 2. device_clocks     The stamps: CLOCK_MONOTONIC on a host, events on a CUDA stream, read one step
                      later. The control message of a later step carries the arrivals to all ranks.
 3. wait_time         This rank's time in a collective = waiting for the last arrival + transfer.
 4. wait_attribution  Whose arrival the group waited for: the last rank's, or, under tensor
                      parallelism, that of the rank which had delayed it.
 5. cost_model        Calls per number of tokens, so that unequal loads are compared at equal load.
 6. collector         Sums of 3 to 5 over the run, per layer and phase; gathered when the run ends.
 7. straggler_causes  Splits the wait that each rank caused: load, tokens, device, host; network.
 8. layer_causes      Splits the same amounts over the layers.
 9. findings          Turns causes above a threshold into sentences with advice.

Two measurements do not depend on stamps of other ranks. stall_detector notices that the process
did not run at all, which 7 takes into account. row_time is the experts' recent time per row, from
which speed-aware capacity follows. loads and decisions count rows and assignments; report is what a
run returns; exporters write while it runs: span_file, routing, metrics,
deepspeed_comms.
"""
