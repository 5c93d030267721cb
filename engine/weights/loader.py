"""Loading weights: a rank reads the checkpoint tensors that it owns and nothing else.

A model yields one `WeightSlot` for each tensor of the checkpoint that this rank needs. Loading
compares the names of all ranks with the headers of all files (`safetensors_header.py`), so that
every mistake is found before data is read and equally on all ranks, then reads this rank's shards
(`reader.py`). `fill_dummy` fills the slots with random weights instead.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.distributed.collectives import gather_objects
from engine.distributed.errors import merge_errors, name_ranks
from engine.distributed.groups import Group
from engine.distributed.health.progress import OnProgress, ProgressReporter, ignore_progress
from engine.weights.reader import DTYPES, ReadJob, read_all
from engine.weights.safetensors_header import Catalog, CheckpointError, read_catalog
from engine.weights.slot import WeightSlot

__all__ = ["CheckpointError", "LoadReport", "WeightSlot", "fill_dummy", "load_weights"]

_MAX_SHOWN = 10  # names of each kind in one error
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
    slots = list(slots)
    catalog = _agree_on_catalog(Path(path), slots, ignored, group)
    jobs = [
        ReadJob(name, catalog.entries[name], slot.target, slot.bounds())
        for slot in slots
        if (name := _name_in(catalog, slot.name, slot.aliases)) is not None
    ]
    bytes_read = catalog.bytes_read + read_all(jobs, group, reporter)
    return LoadReport(bytes_read, len(jobs), time.perf_counter() - began)


def _agree_on_catalog(
    path: Path, slots: Sequence[WeightSlot], ignored: Iterable[str], group: Group | None
) -> Catalog:
    """Return the checkpoint's tensors, once all ranks see the same ones and none is missing."""
    catalog, error = Catalog({}, 0), None
    try:
        catalog = read_catalog(path)
    except CheckpointError as caught:
        error = str(caught)
    names = {slot.name: (slot.full_shape, slot.aliases) for slot in slots}
    answers = _gather((error, _digest(catalog), names), group)
    _raise_any([error for error, _, _ in answers], group)
    if len({digest for _, digest, _ in answers}) > 1:
        found = _differences(_gather(_digest_files(catalog), group), group)
        raise CheckpointError(
            f"the hosts of this run hold different files in {path}: {_shorten(found)}; copy the "
            "same to all"
        )
    wanted = {name: want for _, _, names in answers for name, want in names.items()}
    # All ranks check everything, so they agree unless `ignored` differs between them.
    problems = list(_mismatches(wanted, catalog, ignored))
    error = "\n  - ".join([f"{path} does not fit the model:", *problems]) if problems else None
    _raise_any(_gather(error, group), group)
    return catalog


def _gather(value: Any, group: Group | None) -> list[Any]:
    return [value] if group is None else gather_objects(value, group)


def _raise_any(errors: Sequence[str | None], group: Group | None) -> None:
    ranks = (0,) if group is None else group.ranks
    if found := {rank: text for rank, text in zip(ranks, errors, strict=True) if text is not None}:
        raise CheckpointError(merge_errors(found, len(ranks)))


def _name_in(catalog: Catalog, name: str, aliases: tuple[str, ...]) -> str | None:
    return next((known for known in (name, *aliases) if known in catalog.entries), None)


def _mismatches(
    wanted: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
    catalog: Catalog,
    ignored: Iterable[str],
) -> Iterator[str]:
    """Yield a sentence for each kind of difference between the model's tensors and the files'."""
    missing, misshapen, refused = [], [], []
    for name, (shape, aliases) in wanted.items():
        if (found := _name_in(catalog, name, aliases)) is None:
            missing.append(name)
            continue
        entry = catalog.entries[found]
        if entry.shape != tuple(shape):
            misshapen.append(
                f"{found} in {entry.file.name} is {list(entry.shape)}, must be {list(shape)}"
            )
        if entry.dtype not in DTYPES:
            refused.append(f"{found} in {entry.file.name} is {entry.dtype}")
    known = set(wanted).union(*(aliases for _, aliases in wanted.values()))
    skip = [re.compile(pattern) for pattern in ignored]
    extra = [
        name
        for name in catalog.entries
        if name not in known and not any(pattern.search(name) for pattern in skip)
    ]
    yield from _listed(
        "tensors are missing; is config.json of this checkpoint?",
        [_with_nearest(name, extra) for name in missing[:_MAX_SHOWN]] + missing[_MAX_SHOWN:],
    )
    yield from _listed(
        "tensors belong to no part of the model; is config.json theirs? if so, use the files it "
        "was published with",
        [f"{name} in {catalog.entries[name].file.name}" for name in extra],
    )
    yield from _listed("tensors have the wrong shape; is config.json theirs?", misshapen)
    yield from _listed(
        "tensors are not F32, BF16 or F16; quantised weights need scales that this engine "
        "does not apply: convert the checkpoint to bfloat16",
        refused,
    )


def _listed(what: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield f"{len(items)} {what}: {_shorten(items)}"


def _shorten(items: Sequence[str]) -> str:
    return "; ".join(items[:_MAX_SHOWN]) + ("; ..." if len(items) > _MAX_SHOWN else "")


def _with_nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names[:5000], n=1)
    return f"{name} (the files have {near[0]})" if near else name


def _digest(catalog: Catalog) -> str:
    return hashlib.sha256(repr(sorted(_digest_files(catalog).items())).encode()).hexdigest()


def _digest_files(catalog: Catalog) -> dict[str, str]:
    """Return a digest per file name of which tensors the file holds and where."""
    states: dict[str, Any] = {}
    for name, entry in sorted(catalog.entries.items()):
        line = (name, entry.dtype, entry.shape, entry.offset)
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

    Matrices are normal with standard deviation 0.02, norms 1, biases 0. The full tensor is drawn in
    chunks of rows, each from its own seed, and a shard draws only the chunks it needs, so the
    values are the same for every number of ranks and every tensor-parallel size. Not collective.

    Args:
        slots: this rank's.
        seed: of all tensors.
        report: called once per slot.
    """
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for _ in pool.map(lambda slot: _fill(slot, seed), list(slots)):
            report()  # iterating over the results also raises a worker's error


def _fill(slot: WeightSlot, seed: int) -> None:
    target, bounds = slot.target.detach(), slot.bounds()
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
