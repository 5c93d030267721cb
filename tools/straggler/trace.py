"""Writes a run as a Chrome trace: the JSON trace-event format, which Perfetto and Chrome open.

A rank is a process, its steps are slices, its spans slices within them, and a collective's span
holds two more: `waiting` for late ranks, then `transfer`. All ranks are on one timeline that begins
at 0, in microseconds; `otherData.begin_ns` is that moment on the run's clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from straggler.run import RankSpans, Run

# About 250 MB; viewers get slow beyond it.
MAX_SPANS = 1_000_000
_THREAD = 1


def write_trace(
    run: Run, path: Path, *, around: int | None = None, max_spans: int = MAX_SPANS
) -> str | None:
    """Write the spans of every rank of every group; return a note where not all steps fit.

    around: the step that must be in, by default the last one. max_spans: of all ranks; beyond it
    neighbouring steps around that one are written.

    Raises:
        ValueError: the file cannot be written.
    """
    first, last = _window(run, around, max_spans)
    begin = min(
        int(rank.starts_S[(rank.steps_S >= first) & (rank.steps_S <= last)].min(initial=2**62))
        for rank in run.ranks
    )
    head = {"run": run.name, "begin_ns": begin, "steps": [first, last]}
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps(head))
            file.write(',\n"traceEvents": [\n')
            for index, event in enumerate(_events(run, first, last, begin)):
                file.write((",\n" if index else "") + json.dumps(event, separators=(",", ":")))
            file.write("\n]}\n")
    except OSError as error:
        raise ValueError(
            f"--trace {path}: cannot be written: {error.strerror}; name another file"
        ) from error
    if first == min(_firsts(run)) and last == max(int(rank.steps_S[-1]) for rank in run.ranks):
        return None
    return (
        f"{path.name} holds steps {first:,} to {last:,}: all would be too many for a viewer; "
        "--step N chooses others."
    )


def _firsts(run: Run) -> list[int]:
    return [int(rank.steps_S[0]) for rank in run.ranks]


def _window(run: Run, around: int | None, max_spans: int) -> tuple[int, int]:
    """Return first and last of the steps to write: as many as fit, `around` in their middle."""
    steps = np.unique(np.concatenate([rank.steps_S for rank in run.ranks]))
    counts = np.zeros(len(steps), dtype=np.int64)
    for rank in run.ranks:
        counts[np.searchsorted(steps, rank.steps_S)] += np.diff(rank.begins_S)
    middle = len(steps) - 1 if around is None else int(np.searchsorted(steps, around))
    low = high = min(middle, len(steps) - 1)
    room = max_spans - int(counts[low])
    while low > 0 or high < len(steps) - 1:
        down = low > 0 and (high - middle >= middle - low or high == len(steps) - 1)
        room -= int(counts[low - 1 if down else high + 1])
        if room < 0:
            break
        low, high = (low - 1, high) if down else (low, high + 1)
    return int(steps[low]), int(steps[high])


def _events(run: Run, first: int, last: int, begin: int) -> Iterator[dict[str, Any]]:
    for rank in run.ranks:
        header = rank.header
        # Viewers take process 0 for the idle one.
        process = header.rank + 1
        names = (
            ("process_name", {"name": f"rank {header.rank} ({header.host})"}),
            ("process_sort_index", {"sort_index": header.rank}),
        )
        for name, args in names:
            yield {"ph": "M", "pid": process, "tid": 0, "name": name, "args": args}
        args = {"name": "phases"}
        yield {"ph": "M", "pid": process, "tid": _THREAD, "name": "thread_name", "args": args}
        chosen = np.flatnonzero((rank.steps_S >= first) & (rank.steps_S <= last))
        for index in chosen.tolist():
            yield from _step_events(rank, index, process, begin)


def _step_events(rank: RankSpans, index: int, process: int, begin: int) -> Iterator[dict[str, Any]]:
    start, end = int(rank.starts_S[index]), int(rank.ends_S[index])
    if index + 1 < len(rank.steps_S):
        # Clocks that are aligned anew may let steps overlap by a hair, which is no nesting.
        end = max(start, min(end, int(rank.starts_S[index + 1])))
    phases, collectives = rank.header.phases, rank.header.collectives

    def slice_(name: str, begins: int, ends: int, args: dict[str, Any]) -> dict[str, Any]:
        ends = min(ends, end)
        begins = min(begins, ends)
        return {
            "ph": "X",
            "pid": process,
            "tid": _THREAD,
            "name": name,
            "ts": (begins - begin) / 1000,
            "dur": (ends - begins) / 1000,
            "args": args,
        }

    prefill, decode = rank.tokens_S2[index].tolist()
    tokens = {"prefill": prefill, "decode": decode}
    yield slice_(f"step {rank.steps_S[index]}", start, end, tokens)
    for phase, layer, offset, duration, rows, num_bytes, waited in rank.spans(index).tolist():
        at = start + offset
        waited = min(waited, duration)
        args = {"layer": layer, "tokens": rows, "bytes": num_bytes}
        args["waited"] = None if waited < 0 else waited / 1000
        yield slice_(phases[phase], at, at + duration, args)
        if phase in collectives and waited >= 0:
            if waited:
                yield slice_("waiting", at, at + waited, {})
            yield slice_("transfer", at + waited, at + duration, {})
