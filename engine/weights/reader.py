"""Reader: tensor bytes from files into tensors, by several threads, with every value checked.

`loader.py` decides what is read, this module reads it. Positioned reads write directly into the
destination's memory, so peak memory is the destination's (a mapped file's pages would be added to
it). A tensor that is sharded within its rows, converted to another dtype or copied to a GPU passes
through a staging buffer of a few MiB per thread.

Every value is checked while it is in cache: NaN, infinity and values that the target's dtype cannot
represent are errors.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.distributed.collectives import gather_objects
from engine.distributed.errors import merge_errors
from engine.distributed.groups import Group
from engine.distributed.health.progress import OnProgress, ProgressReporter
from engine.weights.entry import TensorEntry
from engine.weights.id_table import read_ids
from engine.weights.reading_buffers import CHUNK_BYTES, Files, Staging
from engine.weights.row_sink import RowSink, fill_sink
from engine.weights.safetensors_header import CheckpointError
from engine.weights.stored_reader import read_kept, read_stored

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

_CHECK_ITEMS = 1 << 16
_NUM_THREADS = 4  # one thread does not saturate a network or parallel file system
_STATUS_INTERVAL_S = 5.0  # between two exchanges of the ranks' status

# Smallest bits of |x|, as an unsigned integer, of a value that is infinite or NaN in its dtype ...
_NOT_FINITE = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00, "F64": 0x7FF0000000000000}
# ... and of a value that rounds to infinity in a narrower dtype.
_OVERFLOW = {
    ("F32", torch.float16): 0x477FF000,  # 65520
    ("BF16", torch.float16): 0x4780,  # 65536, the next bfloat16 after 65280
    ("F32", torch.bfloat16): 0x7F7F8000,
    ("F64", torch.float32): 0x47EFFFFFF0000000,  # 2**128 - 2**103
    # Half a float32 step below the limit of F32: torch rounds to float32 first.
    ("F64", torch.float16): 0x40EFFDFFF0000000,
    ("F64", torch.bfloat16): 0x47EFEFFFF0000000,
}


@dataclass(frozen=True, slots=True)
class ReadJob:
    """One shard to read from a file's tensor into `target`."""

    name: str
    entry: TensorEntry
    # of the bounds' shape; float32, bfloat16 or float16, of ids int64; on any device
    target: torch.Tensor
    bounds: tuple[tuple[int, int], ...]  # [start, stop) per dimension of the file's tensor
    sink: RowSink | None = None  # where the values go instead
    offset: float = 0.0  # added to every value, in float32
    ids_below: int = 0  # of a table of ids, which is read whole; 0: real numbers


def read_all(
    jobs: Iterable[ReadJob], group: Group | None, reporter: ProgressReporter | None = None
) -> int:
    """Run all jobs and return the bytes read. Collective over `group`: every rank must call.

    Ranks have unequal work, which may take longer than the group's timeout. They exchange their
    status every few seconds, so that an error on one rank stops the others and a dead rank is
    noticed; a rank whose reads do not return is noticed by its missing progress.

    Raises CheckpointError with the same text on every rank.
    """
    queue = deque(sorted(jobs, key=lambda job: (job.entry.file, job.entry.offset)))
    files, reporter = Files(), reporter or ProgressReporter()
    is_waiting = False
    with ThreadPoolExecutor(_NUM_THREADS, "read-weights") as pool:
        try:
            readers = [
                pool.submit(_read_jobs, queue, files, reporter.advance) for _ in range(_NUM_THREADS)
            ]
            while True:
                done, pending = wait(readers, timeout=_STATUS_INTERVAL_S)
                problem = next(
                    (text for reader in done if (text := _problem(reader.exception()))), None
                )
                if not pending and not is_waiting:
                    is_waiting = True
                    reporter.wait()
                if _all_done(problem, not pending, group):
                    return sum(reader.result() for reader in readers)
        finally:
            queue.clear()  # on an error: readers stop after their current tensor
            pool.shutdown()
            files.close()


def hold_equal_values(first: ReadJob, second: ReadJob, report: OnProgress) -> tuple[bool, int]:
    """Return whether two tensors would be loaded as the same values, and the bytes read for it.

    Compares the rows of `first`'s bounds, whole, and stops at the first difference. Writes to no
    target.

    Args:
        first, second: of one shape, and with targets of one dtype.
        report: called once per chunk.

    Raises CheckpointError.
    """
    (start, stop), width, num_bytes = first.bounds[0], math.prod(first.entry.shape[1:]), 0
    step = max(1, CHUNK_BYTES // (4 * max(1, width)))
    files = Files()
    try:
        for row in range(start, stop, step):
            parts = []
            for job in (first, second):
                dtype = DTYPES[job.entry.dtype]
                run = _Run(job, files.open(job.entry.file), job.entry.offset)
                count = min(step, stop - row) * width
                memory = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
                run.read(memory.numpy(), row * width * dtype.itemsize)
                parts.append(memory.view(dtype).to(first.target.dtype))
                num_bytes += len(memory)
            report()
            if not torch.equal(*parts):
                return False, num_bytes
        return True, num_bytes
    finally:
        files.close()


def _problem(error: BaseException | None) -> str | None:
    if error is None or isinstance(error, CheckpointError):
        return error and str(error)
    return f"{type(error).__name__} while reading weights: {error}"


def _all_done(problem: str | None, done: bool, group: Group | None) -> bool:
    if group is None:
        answers, ranks = [(problem, done)], (0,)
    else:
        answers, ranks = gather_objects((problem, done), group), group.ranks
    found = {rank: text for rank, (text, _) in zip(ranks, answers, strict=True) if text is not None}
    if found:
        raise CheckpointError(merge_errors(found, len(answers)))
    return all(done for _, done in answers)


def _read_jobs(queue: deque[ReadJob], files: Files, report: OnProgress) -> int:
    """Run jobs until none is left, in one thread; return the bytes read."""
    staging = Staging()
    num_bytes = 0
    try:
        while True:
            try:
                job = queue.popleft()
            except IndexError:
                return num_bytes
            num_bytes += _read_job(job, files, staging, report)
    except BaseException:
        queue.clear()  # stops the other readers
        raise


def _read_job(job: ReadJob, files: Files, staging: Staging, report: OnProgress) -> int:
    """Read one tensor's shard; return the bytes read."""
    entry, target, sink = job.entry, job.target.detach(), job.sink
    if target.numel() == 0:
        return 0
    if job.offset:
        wide = torch.empty(target.shape, dtype=torch.float32)
        num_bytes = _read_job(replace(job, target=wide, offset=0.0), files, staging, report)
        target.copy_(wide.add_(job.offset))
        return num_bytes

    def read(part: TensorEntry, memory: torch.Tensor, begin: int) -> None:
        where = f"{job.name} in {part.file}"
        _read_bytes(files.open(part.file), memory.numpy(), part.offset + begin, where)

    if sink is not None:
        if sink.keeps_stored and entry.stored is not None:
            index = job.bounds[0][0] if len(entry.stored.shape) == 3 else 0
            return read_kept(job.name, entry.stored, index, sink, target.dtype, read, report)

        def fill(view: torch.Tensor) -> int:
            return _read_job(replace(job, target=view, sink=None), files, staging, report)

        return fill_sink(sink, target, fill)
    if job.ids_below:
        return read_ids(job.name, entry, target, job.ids_below, read, report)
    if entry.stored is not None:
        return read_stored(job.name, entry.stored, target, job.bounds, read, report)
    dtype = DTYPES[entry.dtype]
    # The rows that hold the shard are contiguous bytes; its columns are selected in memory.
    (first, last), *columns = job.bounds or ((0, 1),)
    row_shape = entry.shape[1:]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    begin, num_bytes = entry.offset + first * row_bytes, (last - first) * row_bytes
    run = _Run(job, files.open(entry.file), begin)
    whole_rows = all(bound == (0, size) for bound, size in zip(columns, row_shape, strict=True))
    if whole_rows and target.is_contiguous():
        target, row_shape, columns, row_bytes = target.view(-1), (), [], dtype.itemsize
        if target.device.type == "cpu" and target.dtype == dtype:
            memory = target.view(torch.uint8).numpy()
            for low in range(0, num_bytes, CHUNK_BYTES):
                run.read(memory[low : low + CHUNK_BYTES], low)
                report()
            return num_bytes
    cut = (slice(None), *(slice(start, stop) for start, stop in columns))
    step = max(1, CHUNK_BYTES // row_bytes)
    for row in range(0, target.shape[0], step):
        part = target[row : row + step]
        buffer = staging.take(part.shape[0] * row_bytes, target.device)
        run.read(buffer.numpy(), row * row_bytes)
        report()
        part.copy_(buffer.view(dtype).view(part.shape[0], *row_shape)[cut], non_blocking=True)
        staging.give_back(target.device)
    return num_bytes


class _Run:
    """Contiguous bytes of one file, read and checked chunk by chunk."""

    def __init__(self, job: ReadJob, descriptor: int, begin: int) -> None:
        self._job, self._descriptor, self._begin = job, descriptor, begin
        self._not_finite = _NOT_FINITE[job.entry.dtype]
        self._limit = _OVERFLOW.get((job.entry.dtype, job.target.dtype), self._not_finite)

    def read(self, memory: np.ndarray, low: int) -> None:
        """Fill `memory` (uint8) with the bytes from byte `low` of the run."""
        where = f"{self._job.name} in {self._job.entry.file}"
        _read_bytes(self._descriptor, memory, self._begin + low, where)
        worst = _largest_bits(memory, DTYPES[self._job.entry.dtype].itemsize)
        if worst >= self._not_finite:
            raise CheckpointError(
                f"{where}: holds NaN or infinity; the checkpoint is damaged or diverged in training"
            )
        if worst >= self._limit:
            raise CheckpointError(
                f"{where}: holds values too large for {self._job.target.dtype}; set "
                "model.dtype to bfloat16 or float32"
            )


def _read_bytes(descriptor: int, memory: np.ndarray, begin: int, where: str) -> None:
    """Fill `memory` (uint8) with the bytes from byte `begin` of a file."""
    filled = 0
    while filled < len(memory):
        try:
            rest = memoryview(memory)[filled:]  # type: ignore[arg-type]
            count = os.preadv(descriptor, [rest], begin + filled)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{where}: the file became shorter while it was read")
        filled += count


def _largest_bits(memory: np.ndarray, itemsize: int) -> int:
    """Return the largest |x| in `memory` as bits, which order as the IEEE floats do, NaN last."""
    values = memory.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[itemsize])
    without_sign = values.dtype.type((1 << 8 * itemsize - 1) - 1)
    return max(
        int((values[low : low + _CHECK_ITEMS] & without_sign).max())
        for low in range(0, len(values), _CHECK_ITEMS)
    )
