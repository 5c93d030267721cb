"""One module a contender: a process that loads once and then runs whatever the bench asks for.

A worker runs in its contender's own interpreter, so it imports nothing of the bench but
`bench.protocol`, and its peer's package only inside `load`.
"""
