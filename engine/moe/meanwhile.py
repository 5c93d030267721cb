"""Work done while a collective is under way: the shared expert, while the ranks agree.

Called by `layer.py` where loads are exchanged and by `agreement.py` where capacity is agreed on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress


def run_meanwhile(work: Callable[[], None], wait: Callable[[], object]) -> None:
    """Run `work`; where it fails, `wait` for the collective before its error goes on.

    A collective nobody waits for outlives its buffers. What went wrong first is what to tell, also
    where the others are gone by now.
    """
    try:
        work()
    except Exception:
        with suppress(Exception):
            wait()
        raise
