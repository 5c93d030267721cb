"""Halves: two half batches of a step that take turns, so that one works while the other travels.

`moe.overlap.two_batch`. A layer call is a generator that stops where its rows are under way
(`MoELayer.stages`); a half batch is the generator of all its layers (`CausalLM`). `interleave` goes
from one to the other at every stop:

    compute   A attention  B attention | A experts | B experts | A next attention | B next ...
    network                  A out     |   B out   |  A back   |     B back       |

Every rank splits its own sequences and makes the same stops, also with an empty half, so all start
the same collectives in the same order: A out, B out, A back, B back, layer after layer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

_T = TypeVar("_T")

Stages = Generator[None, None, _T]


def finish(stages: Stages[_T]) -> _T:
    """Run to the end without leaving at the stops."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value


def interleave(parts: Sequence[Stages[_T]]) -> list[_T]:
    """Run all to the end, each from stop to stop in turn; their results in order.

    Where one fails the others are closed, which waits for what they have under way.
    """
    results: dict[int, _T] = {}
    try:
        while len(results) < len(parts):
            for index, stages in enumerate(parts):
                if index in results:
                    continue
                try:
                    next(stages)
                except StopIteration as end:
                    results[index] = end.value
    finally:
        for stages in parts:
            stages.close()
    return [results[index] for index in range(len(parts))]
