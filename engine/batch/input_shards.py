"""Slices: one input shared by several runs that know nothing of each other, such as a job array.

    launch/infer.py --slice 3/16     the fourth of 16 equal, contiguous parts of the requests

A slice is a job of its own, with the output `<output>.slice-00003-of-00016` and a ledger beside it.
Requests keep their index in the whole input: seeds, duplicates and line numbers are those of a run
without slices. Whoever finishes a slice looks, under the lock of the whole output, whether all are
there; the last one copies them, in order, into the output and removes them:

    1. copy      <output>.merge-<host>-<pid>-<random>.tmp, synced, renamed to <output>
    2. seal      if it is as long as the slices, <output>.job.json: now the output is complete
    3. remove    the slices, and copies that killed merges left

Killed before 2, any slice that is run again does all of it anew; after 2 it removes what is left.
On a file system without locks several may merge at once: each copies into a file of its own, and
the others find that the first has sealed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.batch.atomic_files import Busy, DurableWriter, fsync_directory, read_json, write_text
from engine.batch.ledger import Ledger, parts_dir
from engine.batch.manifest import JobError, beside, finished_as, seal
from engine.distributed.health.progress import Tick, no_tick

_COPY_BYTES = 4 << 20
_PATIENCE_S = 600.0  # for another run that merges at this moment
_NAME = re.compile(r"\.slice-(\d{5})-of-(\d{5})(.*)")
_COPY = re.compile(r"\.merge-(.+)-(\d{1,9})-[0-9a-f]{8}\.tmp")
_SUMS = ("total", "resumed", "errors", "requests", "prompt_tokens", "generated_tokens")
MOST = 99_999


@dataclass(frozen=True, slots=True)
class Slice:
    """Part `index`, from 0, of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read `I/N`. Raises JobError."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise JobError(
                f"--slice {text}: must be I/N with 0 <= I < N <= {MOST}; the first of 16 is 0/16"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def lines(self, total: int) -> range:
        """Which of `total` requests are its own; the first slices take one more of a remainder."""
        size, more = divmod(total, self.count)
        first = self.index * size + min(self.index, more)
        return range(first, first + size + (self.index < more))

    def output(self, output: Path) -> Path:
        """Where its records go."""
        return output.with_name(f"{output.name}.slice-{self.index:05d}-of-{self.count:05d}")


def is_merged(output: Path, part: Slice, manifest: dict[str, Any]) -> bool:
    """Whether the whole output is complete; removes what is left of its slices then.

    Raises JobError where `part` must not be run: another job's output or ledger, or slices of
    another division, are in its place.
    """
    changes = finished_as(output, manifest)
    if changes == []:
        _remove_slices(output)
        return True
    found = _slices(output)
    _refuse_whole_run(output)
    if changes is not None and not found:
        raise JobError(
            f"--slice {part}: --output {output} exists and is not this job's: "
            f"{'; '.join(changes)}. Remove it, or use another --output"
        )
    if others := sorted(count for count in found if count != part.count):
        raise JobError(
            f"--slice {part}: beside {output} lie slices of {others[0]}; go on with "
            f"--slice I/{others[0]}, remove {output.name}.slice-*, or use another --output"
        )
    return False


def join(output: Path, count: int, manifest: dict[str, Any], tick: Tick = no_tick) -> str:
    """Merge the slices into `output` if all are complete; return in a sentence what was done.

    manifest: of the whole job. tick: called every now and then. Raises OSError, and JobError for a
    slice of another job.
    """
    with _held(output, tick) as ledger:
        _refuse_whole_run(output)
        if finished_as(output, manifest) == []:
            _remove_slices(output)
            return f"{output} is complete"
        slices = [Slice(index, count) for index in range(count)]
        missing = [part.index for part in slices if not _complete(part, output, manifest)]
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            return f"slices {shown} of {count} are not complete yet; the last one merges all"
        try:
            _merge([part.output(output) for part in slices], output, ledger, manifest, tick)
        except FileNotFoundError:
            # Without locks another run may have sealed and begun to remove.
            if finished_as(output, manifest) != []:
                raise
        _remove_slices(output)
        return f"{output} is complete: {count} slices, merged"


def _merge(
    slices: list[Path], output: Path, ledger: Ledger, manifest: dict[str, Any], tick: Tick
) -> None:
    """Copy and seal. Raises JobError, with the slices untouched, for a copy of the wrong size."""
    size = sum(path.stat().st_size for path in slices)
    report = _total([read_json(beside(path, "report.json")) for path in slices])
    config = beside(slices[0], "config.yaml").read_text(encoding="utf-8")
    _copy(slices, output, tick)
    write_text(beside(output, "config.yaml"), config)
    write_text(beside(output, "report.json"), json.dumps(report, indent=2) + "\n")
    if (copied := output.stat().st_size) != size:
        raise JobError(
            f"{output} is {copied} bytes, its slices are {size}: something else has written to one "
            "of them. The slices are kept; run any of them again to merge anew"
        )
    seal(ledger, manifest, report["errors"])


@contextmanager
def _held(output: Path, tick: Tick) -> Iterator[Ledger]:
    """The whole output's ledger, which is only a lock here."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            ledger = Ledger(output)
            break
        except Busy:
            if time.monotonic() >= deadline:
                raise
        tick()
        time.sleep(0.2)
    try:
        yield ledger
    finally:
        if ledger.parts.exists() and not _is_whole_run(output):
            ledger.remove()
        ledger.close()


def _is_whole_run(output: Path) -> bool:
    """Whether a run without slices has records of this output."""
    return parts_dir(output).joinpath("manifest.json").exists()


def _refuse_whole_run(output: Path) -> None:
    if _is_whole_run(output):
        raise JobError(
            f"--slice: {parts_dir(output)} belongs to a run without --slice; finish that one with "
            "its own command, or use another --output"
        )


def _complete(part: Slice, output: Path, manifest: dict[str, Any]) -> bool:
    """Whether a slice is there as a whole. Raises JobError if it is of another job."""
    own = part.output(output)
    # Its run may be between output and seal. Asked first: what it lets go of, it has sealed.
    at_work = parts_dir(own).exists()
    changes = finished_as(own, manifest)
    if changes and not at_work:
        raise JobError(f"{own}: is no slice of this job: {'; '.join(changes)}; remove it")
    return changes == []


def _copy(sources: list[Path], output: Path, tick: Tick) -> None:
    host = socket.gethostname()
    for path, match in _files_like(_COPY, output):
        if match[1] == host and not _is_alive(int(match[2])):
            path.unlink(missing_ok=True)  # before it takes the room of this copy
    own = f"{output.name}.merge-{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary = output.with_name(own)
    try:
        with temporary.open("wb") as target:
            out = DurableWriter(target, tick)
            for source in sources:
                with source.open("rb") as file:
                    while block := file.read(_COPY_BYTES):
                        out.write(block)
            out.sync()
        os.replace(temporary, output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(output.parent)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _total(reports: list[dict[str, Any] | None]) -> dict[str, Any]:
    """One report of all slices: their sums, then each of them."""
    present = [report or {} for report in reports]
    sums = {key: sum(report.get(key, 0) for report in present) for key in _SUMS}
    return {**sums, "capacity": present[0].get("capacity"), "slices": present}


def _slices(output: Path) -> set[int]:
    """The divisions of which slices, begun or complete, lie beside the output."""
    return {int(match[2]) for _, match in _files_like(_NAME, output)}


def _remove_slices(output: Path) -> None:
    """Once the output is sealed: the slices, and copies of it that nobody needs any more."""
    for path, _ in _files_like(_NAME, output) + _files_like(_COPY, output):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a ledger that another run has just left
        else:
            path.unlink(missing_ok=True)


def _files_like(pattern: re.Pattern[str], output: Path) -> list[tuple[Path, re.Match[str]]]:
    """What stands beside the output under its name and a suffix of this pattern."""
    found = []
    for path in output.parent.iterdir():
        if path.name.startswith(output.name):
            match = pattern.fullmatch(path.name, len(output.name))
            if match is not None:
                found.append((path, match))
    return found
