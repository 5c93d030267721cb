"""A batch job over files: open it, share its lines, keep what finishes, and merge it at the end.

Every rank holds one `FileJob`; rank 0's also holds the ledger. `engine/batch/run.py` drives it:

    open      rank 0 scans input and ledger while the others wait      collective over all ranks
    write     finished records, durable before it returns              each data rank alone
    close     no more records                                          each rank alone
    merge, seal   the output, once every rank has closed               rank 0 alone

With a slice (`batch_slices.py`), the output is the slice's own until `seal` finds all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.batch.input_index import Pending, scan_input
from engine.batch.input_shards import Slice, is_merged, join
from engine.batch.ledger import Ledger, PartWriter, parts_dir
from engine.batch.manifest import JobError, admit, make_manifest, seal
from engine.batch.on_rank_0 import describe, on_rank_0
from engine.config import Config
from engine.distributed.errors import raise_on_any_rank
from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter
from engine.request import Completion


class FileJob:
    """One rank's part of a job. num_total: its requests. num_resumed: those done earlier."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        input: Path,
        output: Path,
        part: Slice | None = None,
        activity: ProgressReporter | None = None,
    ) -> None:
        """part: the slice of the input to run; None: all of it. activity: told how the work on
        files gets on.
        """
        self._activity = activity or ProgressReporter()
        self.input = input
        self.output = output if part is None else part.output(output)
        self._whole = output
        self._part = part
        self._own = range(0)
        self.num_total = 0
        self.num_resumed = 0
        self.lines: Pending
        self._config = config
        self._topology = topology
        self._ledger: Ledger | None = None
        self._manifest: dict[str, Any] = {}
        self._size = 0
        self._modified_ns = 0
        self._writer: PartWriter | None = None

    def open(self, key: str, *, overwrite: bool) -> str:
        """Get ready to run; where there is nothing to do, why.

        key: names this run in the store. Raises JobError, the same on every rank. Collective over
        all ranks; takes as long as rank 0 needs to read the input.
        """
        topology, table = self._topology, np.empty((0, 4), dtype=np.int64)

        def scan() -> dict[str, Any]:
            nonlocal table
            found = self._scan(overwrite)
            if isinstance(found, str):
                return {"done": found}
            table = found
            return {"pending": len(table), "total": self.num_total, "size": self._size}

        activity = self._activity
        activity.begin("reading the input and the ledger")
        opened = on_rank_0(topology, f"{key}/open", scan, JobError, activity)
        activity.begin("opening the job")
        if "done" in opened:
            return opened["done"]
        self.num_total = opened["total"]
        self.num_resumed = opened["total"] - opened["pending"]
        table = _broadcast_table(table, opened["pending"], topology)
        problem = None
        try:
            if (size := self.input.stat().st_size) != opened["size"]:
                raise ValueError(
                    f"--input {self.input}: has {size} bytes here and {opened['size']} on rank 0; "
                    "all hosts must see the same file"
                )
            self.lines = Pending(self.input, table)
            if topology.tensor.rank == 0:
                self._writer = PartWriter(parts_dir(self.output), topology.data_rank)
        except FileNotFoundError as error:
            problem = (
                f"{error.filename}: is not there on {topology.host}, though rank 0 sees it; input "
                "and output must be on a file system that all hosts share"
            )
        except (OSError, ValueError) as error:
            problem = f"on {topology.host}: {describe(error)}"
        activity.wait()
        raise_on_any_rank(topology.world, problem, JobError)
        return ""

    def write(self, completions: list[Completion]) -> None:
        """Make the records of finished requests durable. Raises OSError."""
        assert self._writer is not None, "only the first rank of a tensor group finishes requests"
        for completion in completions:
            if completion.error is not None and completion.error["line"] is None:
                completion.error["line"] = self.lines.number_of(completion.index)
        self._writer.append(completions)

    def close(self) -> None:
        """Close the input and this rank's part."""
        self.lines.close()
        if self._writer is not None:
            self._writer.close()

    def merge(self) -> int:
        """Write the output; return how many records are errors. Raises OSError and ValueError.

        Rank 0 only, once every rank has closed.
        """
        assert self._ledger is not None, "only rank 0 merges"
        if (now := self.input.stat()).st_mtime_ns != self._modified_ns:
            raise ValueError(
                f"--input {self.input}: was written to while the job ran ({now.st_size} bytes); "
                "the same command says whether its content is still what was run"
            )
        return self._ledger.merge(self._own, self._activity.tick)

    def seal(self, num_errors: int) -> str:
        """Declare the output complete and remove the ledger; return what there is to say of it.

        Rank 0 only, its last act. Raises OSError and JobError.
        """
        assert self._ledger is not None, "only rank 0 seals"
        seal(self._ledger, self._manifest, num_errors)
        self._ledger.close()
        return self._join()

    def _join(self) -> str:
        """Merge the slices if this one was the last."""
        if self._part is None:
            return ""
        done = join(self._whole, self._part.count, self._manifest, self._activity.tick)
        return f"slice {self._part} is complete; {done}"

    def _scan(self, overwrite: bool) -> np.ndarray | str:
        """Open input and ledger on rank 0; return the table of pending lines, or, where there are
        none, why.
        """
        check_output(self._whole, self.input)
        if self._part is not None and overwrite:
            raise JobError(
                f"--slice {self._part} --overwrite: would discard what other slices have done; "
                f"remove {self._whole} and {self._whole.name}.slice-*, or use another --output"
            )
        index = scan_input(self.input, self._activity.tick)
        self._manifest = make_manifest(index, self._config)
        self._size, self._modified_ns = index.size, index.modified_ns
        self._own = range(len(index))
        if self._part is not None:
            self._own = self._part.lines(len(index))
            if is_merged(self._whole, self._part, self._manifest):
                return f"{self._whole} is already complete"
        self.num_total = len(self._own)
        ledger = Ledger(self.output)
        try:
            if admit(ledger, self._manifest, overwrite=overwrite) == "complete":
                ledger.close()
                again = "already complete; --overwrite runs the job again"
                return self._join() or f"{self.output} is {again}"
            ledger.create_parts(self._topology.num_data)
            done_n = ledger.done(len(index), self._activity.tick)
        except BaseException:
            ledger.close()
            raise
        self._ledger = ledger
        return Pending.select(index, done_n, self._own)


def check_output(output: Path, input: Path | None = None) -> None:
    """Raise JobError where no output can be written: rank 0 asks before anything else."""
    if not output.parent.is_dir():
        raise JobError(f"--output {output}: the directory {output.parent} does not exist; make it")
    if output.exists():
        if not output.is_file():
            raise JobError(f"--output {output}: is not a regular file; name a file")
        if input is not None and input.exists() and output.samefile(input):
            raise JobError(f"--output {output}: is the input; name another file")


def _broadcast_table(table: np.ndarray, length: int, topology: Topology) -> np.ndarray:
    """Give rank 0's table, int64 [length, 4], to every rank. Collective over all ranks."""
    if topology.world.size == 1 or length == 0:
        return table
    shared = torch.from_numpy(table) if topology.world.rank == 0 else torch.empty(length, 4).long()
    shared = shared.to(topology.device)
    dist.broadcast(shared, src=0, group=topology.world.handle)
    # SYNC: once a job; the table is host data, on the device only for the broadcast.
    return shared.cpu().numpy()
