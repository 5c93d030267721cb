"""GPU roofline: a model of the time of a step, from shapes and a device's figures.

`device.py` has what devices do, `work.py` what a step reads, computes, sends and launches,
`estimate.py` the times that follow, `measured.py` figures of `tools/gpu_suite.py` to compare them
with, `text.py` the tables.
"""
