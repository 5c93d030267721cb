"""Two-batch overlap: one micro-batch computes while the other's rows are in flight.

`moe.overlap.two_batch`. A layer call is a generator that yields while its rows are in flight
(`MoELayer.steps`); a micro-batch is the generator of all its layers (`CausalLM`). `interleave`
switches between the two at every yield:

    compute   A attention  B attention | A experts | B experts | A next attention | B next ...
    network              A dispatch    | B dispatch | A combine |    B combine     |

Every rank splits its own sequences and has the same yield points, also with an empty micro-batch,
so all ranks start the same collectives in the same order: A dispatch, B dispatch, A combine,
B combine, layer after layer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

_T = TypeVar("_T")

Steps = Generator[None, None, _T]  # yields while rows are in flight, returns the result


def run_to_end(steps: Steps[_T]) -> _T:
    """Run a generator to its end, without leaving it at its yield points; return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def interleave(micro_batches: Sequence[Steps[_T]]) -> list[_T]:
    """Run all generators to their ends, switching at every yield; return the results in order.

    Where one fails the others are closed, which waits for the collectives they have in flight.
    """
    results: dict[int, _T] = {}
    try:
        while len(results) < len(micro_batches):
            for index, steps in enumerate(micro_batches):
                if index in results:
                    continue
                try:
                    next(steps)
                except StopIteration as end:
                    results[index] = end.value
    finally:
        for steps in micro_batches:
            steps.close()
    return [results[index] for index in range(len(micro_batches))]
