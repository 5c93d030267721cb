"""What the cores of a machine lose by waiting for each other, whoever runs on them.

Ranks of equal work that meet after each piece of it go as fast as the core that is slowest at the
moment; threads of one process that take work from each other lose nothing to it. `meet.c` measures
both with work that touches no memory, in turns. The cores of a shared machine differ from moment to
moment, so the more often they meet, the more they lose.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.compiled import compile_for_here

_SOURCE = Path(__file__).with_name("meet.c")


class Meeting:
    """The measurement, on these cores. folder: for the program."""

    def __init__(self, cores: Sequence[int], folder: Path) -> None:
        """Raises RuntimeError where there is no C compiler."""
        self.num_cores = len(cores)
        self._cores = [str(core) for core in cores]
        self._program = compile_for_here(_SOURCE, folder)

    def share(self, milliseconds: float, seconds: float = 1.0) -> float:
        """Of the pace of cores that share work, what they keep when they meet this often.

        milliseconds: of work between two meetings. seconds: to measure for.
        """
        done = subprocess.run(
            [self._program, str(milliseconds), str(seconds), *self._cores],
            check=True,
            capture_output=True,
            text=True,
        )
        return float(done.stdout)
