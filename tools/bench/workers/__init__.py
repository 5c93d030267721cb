"""One module per candidate: a process that loads once and then runs what the bench requests.

A worker runs in its candidate's own interpreter, so it imports nothing of the bench but
`bench.protocol`, and its peer's package only inside `load`.
"""
