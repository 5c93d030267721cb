"""A batch job over files: open it, share its lines, keep what finishes, and merge it at the end.

Every rank holds one `FileJob`; rank 0's also holds the ledger. `engine/batch.py` drives it:

    open      rank 0 scans input and ledger while the others wait      collective over all ranks
    write     finished records, durable before it returns              each data rank alone
    close     no more records                                          each rank alone
    merge, seal   the output, once every rank has closed               rank 0 alone
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.batch_input import Pending, scan_input
from engine.batch_manifest import JobError, admit, make_manifest, seal
from engine.config import Config
from engine.distributed.errors import share_errors
from engine.distributed.groups import Topology
from engine.ledger import Ledger, PartWriter, parts_dir
from engine.request import Completion

_POLL_S = 0.02
_HEAR_S = 10.0


class FileJob:
    """One rank's part of a job. num_total: its requests. num_resumed: those done earlier."""

    def __init__(self, config: Config, topology: Topology, input: Path, output: Path) -> None:
        self.input = input
        self.output = output
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

    def open(self, key: str, *, overwrite: bool) -> bool:
        """Get ready to run; False when the output is complete already.

        key: names this run in the store. Raises JobError, the same on every rank. Collective over
        all ranks; takes as long as rank 0 needs to read the input.
        """
        topology, table = self._topology, np.empty((0, 4), dtype=np.int64)

        def scan() -> dict[str, Any] | None:
            nonlocal table
            found = self._scan(overwrite)
            if found is not None:
                table = found
                return {"pending": len(table), "total": self.num_total, "size": self._size}
            return None

        opened = on_rank_0(topology, f"{key}/open", scan, JobError)
        if opened is None:
            return False
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
        share_errors(topology.world, problem, JobError)
        return True

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
        return self._ledger.merge(self.num_total)

    def seal(self, num_errors: int) -> None:
        """Declare the output complete and remove the ledger. Rank 0 only, its last act."""
        assert self._ledger is not None, "only rank 0 seals"
        seal(self._ledger, self._manifest, num_errors)
        self._ledger.close()

    def _scan(self, overwrite: bool) -> np.ndarray | None:
        """Open input and ledger on rank 0; return the table of pending lines, None if complete."""
        check_output(self.output, self.input)
        index = scan_input(self.input)
        self._manifest = make_manifest(index, self._config)
        self._size, self._modified_ns = index.size, index.modified_ns
        self.num_total = len(index)
        ledger = Ledger(self.output)
        try:
            if admit(ledger, self._manifest, overwrite=overwrite) == "complete":
                ledger.close()
                return None
            ledger.create_parts(self._topology.num_data)
            done_n = ledger.done(len(index))
        except BaseException:
            ledger.close()
            raise
        self._ledger = ledger
        return Pending.select(index, done_n)


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


def on_rank_0(
    topology: Topology, key: str, work: Callable[[], Any], exception: type[Exception]
) -> Any:
    """Run `work` on rank 0 and return its JSON-ready result on every rank.

    An OSError or ValueError of `work` becomes `exception` on every rank. The others poll the store:
    unlike in a collective they may wait for as long as the work takes. Collective over all ranks.
    """
    store = topology.store
    if topology.world.rank != 0:
        while not store.check([key]):
            time.sleep(_POLL_S)
        outcome = json.loads(store.get(key))
        store.add(f"{key}/heard", 1)
        if outcome["error"] is not None:
            raise exception(outcome["error"])
        return outcome["result"]
    try:
        result = work()
    except (OSError, ValueError) as failure:
        _tell(topology, key, error=describe(failure))
        raise exception(describe(failure)) from failure
    except BaseException as failure:
        _tell(topology, key, error=f"rank 0 broke off: {failure!r}", patience_s=0)
        raise
    _tell(topology, key, result)
    return result


def _tell(
    topology: Topology, key: str, result: Any = None, error: str | None = None, patience_s=_HEAR_S
) -> None:
    """Publish an outcome and wait until all have heard: the store may be this very process."""
    store = topology.store
    store.set(key, json.dumps({"error": error, "result": result}))
    deadline = time.monotonic() + patience_s
    while store.add(f"{key}/heard", 0) < topology.world.size - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def describe(error: Exception) -> str:
    """An error in one sentence; of an OSError, the file and what the system says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
