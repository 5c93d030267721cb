"""Barrier cost: what cores lose by waiting for each other, measured without any engine.

Ranks of equal work with a barrier after each piece of it run as fast as the core that is slowest at
the moment; threads of one process that take work from each other lose nothing to it.
`barrier_cost.c` measures both in turns, with work that touches no memory. The cores of a shared
machine differ from moment to moment, so the more frequent the barriers, the larger the loss.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.compiled import compile_for_here

_SOURCE = Path(__file__).with_name("barrier_cost.c")


class BarrierCost:
    """The measurement on given cores."""

    def __init__(self, cores: Sequence[int], folder: Path) -> None:
        """Compile the program into `folder`.

        Raises:
            RuntimeError: there is no C compiler.
        """
        self.num_cores = len(cores)
        self._cores = [str(core) for core in cores]
        self._program = compile_for_here(_SOURCE, folder)

    def kept_share(self, milliseconds: float, seconds: float = 1.0) -> float:
        """Return the share of their speed that cores keep with barriers, against shared work.

        Args:
            milliseconds: work between two barriers.
            seconds: how long to measure.
        """
        done = subprocess.run(
            [self._program, str(milliseconds), str(seconds), *self._cores],
            check=True,
            capture_output=True,
            text=True,
        )
        return float(done.stdout)
