"""Loading weights: a rank reads the checkpoint tensors that it owns and nothing else.

A model yields one `WeightSlot` for each tensor of the checkpoint that this rank needs. Loading
compares the names of all ranks with the headers of all files (`fit.py`, `safetensors_header.py`),
so that every mistake is found before data is read and equally on all ranks, then reads this rank's
shards (`reader.py`), quantised ones through their format (`formats/`). `fill_dummy` fills the slots
with random weights instead.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.distributed.collectives import gather_objects
from engine.distributed.errors import merge_errors, name_ranks
from engine.distributed.groups import Group
from engine.distributed.health.progress import OnProgress, ProgressReporter, ignore_progress
from engine.weights.entry import TensorEntry
from engine.weights.fit import (
    Want,
    holds_values,
    log_unlisted,
    mismatches,
    name_in,
    shorten,
    unknown_tensors,
)
from engine.weights.formats.grouping import read_weights
from engine.weights.id_table import dummy_ids
from engine.weights.reader import ReadJob, hold_equal_values, read_all
from engine.weights.row_sink import fill_sink
from engine.weights.safetensors_header import Catalog, CheckpointError
from engine.weights.slot import WeightSlot

__all__ = ["CheckpointError", "LoadReport", "WeightSlot", "fill_dummy", "load_weights"]

logger = logging.getLogger(__name__)

_DUMMY_STD = 0.02
_DUMMY_CHUNK = 1 << 20  # values drawn from one seed; changing it changes all dummy weights


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one rank read."""

    bytes_read: int  # from files, headers and index included
    tensors_read: int
    seconds: float  # wall time


def load_weights(
    path: str | Path,
    slots: Iterable[WeightSlot],
    *,
    ignored: Iterable[str] = (),
    group: Group | None = None,
    reporter: ProgressReporter | None = None,
) -> LoadReport:
    """Fill every slot from the safetensors checkpoint in a folder.

    Collective over `group`: every rank must call.

    Args:
        path: the folder.
        slots: this rank's.
        ignored: regular expressions (for re.search); a tensor that no rank needs must match one.
        group: ranks that together own all of the model's tensors (`topology.world`); None: this
            rank owns them all.
        reporter: reports the progress of reading.

    Raises:
        CheckpointError: with the same text on every rank, before any data is read when names,
            shapes, dtypes or files are wrong; within seconds when a rank cannot read, or finds NaN,
            infinity or a value that the target's dtype cannot represent.
    """
    began = time.perf_counter()
    slots, ignored = list(slots), tuple(ignored)
    catalog, wanted = _agree_on_catalog(Path(path), slots, ignored, group)
    if group is None or group.rank == 0:
        log_unlisted(Path(path), unknown_tensors(wanted, catalog, ignored), catalog)
    slots, bytes_compared = _resolve_tied(catalog, wanted, slots, group, reporter)
    jobs = [
        _read_job(name, catalog.entries[name], slot)
        for slot in slots
        if (name := name_in(catalog, slot.name, slot.aliases)) is not None
    ]
    bytes_read = catalog.bytes_read + bytes_compared + read_all(jobs, group, reporter)
    return LoadReport(bytes_read, len(jobs), time.perf_counter() - began)


def _read_job(name: str, entry: TensorEntry, slot: WeightSlot) -> ReadJob:
    if entry.stored is None and slot.unquantised is not None:
        slot = slot.unquantised
    if slot.turned is not None and entry.shape != slot.full_shape:
        slot = slot.turned
    if slot.file_shape is not None:
        entry = replace(entry, shape=tuple(slot.full_shape))
    sink, offset, ids_below = slot.sink, slot.offset, slot.ids_below
    return ReadJob(name, entry, slot.target, slot.bounds(), sink, offset, ids_below)


def _resolve_tied(
    catalog: Catalog,
    wanted: Mapping[str, Want],
    slots: Sequence[WeightSlot],
    group: Group | None,
    reporter: ProgressReporter | None,
) -> tuple[list[WeightSlot], int]:
    """Return the slots to fill, and the bytes read to decide it.

    A tied slot remains where the files hold other values for it than for the tensor it is tied to,
    with memory of its own: the files count, not the configuration. Every rank compares a share of
    the rows. Collective over `group`: every rank must call.
    """
    left = [slot for slot in slots if slot.tied_to is None]
    reporter, num_bytes = reporter or ProgressReporter(), 0
    for name in sorted(wanted):  # the same on every rank
        tied_to = wanted[name].tied_to
        if tied_to is None or not (holds_values(catalog, name) and tied_to in catalog.entries):
            continue
        mine = [slot for slot in slots if slot.name == name]
        equal, error = True, None
        try:
            for slot in mine[:1]:
                equal, num_compared = _is_tied(catalog, slot, tied_to, group, reporter)
                num_bytes += num_compared
        except CheckpointError as caught:
            error = str(caught)
        phase = reporter.progress.phase
        reporter.wait()
        answers = _gather((equal, error), group)
        reporter.begin(phase)
        _raise_any([error for _, error in answers], group)
        if all(equal for equal, _ in answers):
            continue
        for slot in mine:
            assert slot.untie is not None, name
            left.append(replace(slot, target=slot.untie()))
        if group is None or group.rank == 0:
            logger.warning(
                "config.json says that %s is tied to %s (tie_word_embeddings: true), but the files "
                "hold different values for the two: using the files' %s; set tie_word_embeddings "
                "to false in config.json",
                name,
                tied_to,
                name,
            )
    return left, num_bytes


def _is_tied(
    catalog: Catalog,
    slot: WeightSlot,
    tied_to: str,
    group: Group | None,
    reporter: ProgressReporter,
) -> tuple[bool, int]:
    """Return whether this rank's share of rows is equal in both tensors, and the bytes read."""
    if any(catalog.entries[name].stored is not None for name in (slot.name, tied_to)):
        return False, 0  # quantised apart, so the files hold two
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    rows, *others = slot.full_shape
    bounds = ((rows * rank // size, rows * (rank + 1) // size), *((0, n) for n in others))
    first, second = (
        ReadJob(name, catalog.entries[name], slot.target, bounds) for name in (slot.name, tied_to)
    )
    return hold_equal_values(first, second, reporter.advance)


def _agree_on_catalog(
    path: Path, slots: Sequence[WeightSlot], ignored: Iterable[str], group: Group | None
) -> tuple[Catalog, Mapping[str, Want]]:
    """Return the checkpoint's tensors and those that any rank needs.

    All ranks then see the same tensors, and none is missing.
    """
    catalog, error = Catalog({}, 0), None
    try:
        catalog = read_weights(path)
    except CheckpointError as caught:
        error = str(caught)
    names = {slot.name: Want.of(slot) for slot in slots}
    answers = _gather((error, _digest(catalog), names), group)
    _raise_any([error for error, _, _ in answers], group)
    if len({digest for _, digest, _ in answers}) > 1:
        found = _differences(_gather(_digest_files(catalog), group), group)
        raise CheckpointError(
            f"the hosts of this run hold different files in {path}: {shorten(found)}; copy the "
            "same to all"
        )
    wanted = {name: want for _, _, names in answers for name, want in names.items()}
    # All ranks check everything, so they agree unless `ignored` differs between them.
    problems = list(mismatches(path, wanted, catalog, ignored))
    error = "\n  - ".join([f"{path} does not fit the model:", *problems]) if problems else None
    _raise_any(_gather(error, group), group)
    return catalog, wanted


def _gather(value: Any, group: Group | None) -> list[Any]:
    return [value] if group is None else gather_objects(value, group)


def _raise_any(errors: Sequence[str | None], group: Group | None) -> None:
    ranks = (0,) if group is None else group.ranks
    if found := {rank: text for rank, text in zip(ranks, errors, strict=True) if text is not None}:
        raise CheckpointError(merge_errors(found, len(ranks)))


def _digest(catalog: Catalog) -> str:
    return hashlib.sha256(repr(sorted(_digest_files(catalog).items())).encode()).hexdigest()


def _digest_files(catalog: Catalog) -> dict[str, str]:
    """Return a digest per file name of which tensors the file holds and where."""
    states: dict[str, Any] = {}
    for name, whole in sorted(catalog.entries.items()):
        parts = {name: whole} if whole.stored is None else whole.stored.parts
        for part, entry in sorted(parts.items()):
            line = (part, entry.dtype, entry.shape, entry.offset)
            state = states.setdefault(entry.file.name, hashlib.sha256())
            state.update(repr(line).encode(errors="backslashreplace"))
    return {file: state.hexdigest() for file, state in sorted(states.items())}


def _differences(digests: Sequence[Mapping[str, str]], group: Group | None) -> list[str]:
    """Return a sentence for each file that is missing on some ranks or differs between ranks."""
    ranks = (0,) if group is None else group.ranks
    found = []
    for file in sorted({file for files in digests for file in files}):
        ranks_of: dict[str | None, list[int]] = {}
        for rank, files in zip(ranks, digests, strict=True):
            ranks_of.setdefault(files.get(file), []).append(rank)
        missing = ranks_of.pop(None, None)
        if len(ranks_of) > 1:
            found.append(f"{file} differs on {' and '.join(map(name_ranks, ranks_of.values()))}")
        elif missing:
            (owners,) = ranks_of.values()
            found.append(f"{file} is only on {name_ranks(owners)}")
    return found


def fill_dummy(
    slots: Iterable[WeightSlot], seed: int, report: OnProgress = ignore_progress
) -> None:
    """Fill every slot with random weights that depend on `seed` and the tensor's name alone.

    Matrices are normal with standard deviation 0.02, norms 1, biases 0, ids equally frequent. The
    full tensor is drawn in chunks of rows, each from its own seed, and a shard draws only the
    chunks it needs, so the values are the same for every number of ranks and every tensor-parallel
    size. Not collective.

    Args:
        slots: this rank's.
        seed: of all tensors.
        report: called once per slot.
    """
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for _ in pool.map(lambda slot: _fill(slot, seed), list(slots)):
            report()  # iterating over the results also raises a worker's error


def _fill(slot: WeightSlot, seed: int) -> None:
    if slot.sink is not None:
        fill_sink(
            slot.sink, slot.target, lambda view: _fill(replace(slot, target=view, sink=None), seed)
        )
        return
    target, bounds = slot.target.detach(), slot.bounds()
    if slot.kind == "ids":
        target.copy_(dummy_ids(slot.full_shape, slot.ids_below))
        return
    if slot.kind != "matrix" or not bounds:
        target.fill_(0.0 if slot.kind == "bias" else 1.0)
        return
    (first, last), *columns = bounds
    cut = tuple(slice(start, stop) for start, stop in columns)
    row_shape = slot.full_shape[1:]
    step = max(1, _DUMMY_CHUNK // max(1, math.prod(row_shape)))
    for low in range(first - first % step, last, step):
        high = min(low + step, slot.full_shape[0])
        key = hashlib.blake2b(f"{seed}\0{slot.name}\0{low}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        values = torch.empty(high - low, *row_shape).normal_(0.0, _DUMMY_STD, generator=generator)
        start, stop = max(low, first), min(high, last)
        part = values[start - low : stop - low][(slice(None), *cut)]
        target[start - first : stop - first].copy_(part)
