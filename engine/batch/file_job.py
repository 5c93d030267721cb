"""A batch job over files: open it, share its lines, keep what finishes, merge it at the end.

Every rank holds one `FileJob`; rank 0's also holds the ledger. The steps, in order:

    open      rank 0 scans input and ledger while the others wait      collective over all ranks
    write     finished records, durable before it returns              each data rank alone
    close     no more records                                          each rank alone
    merge, finalize   the output, once every rank has closed           rank 0 alone

With an input shard (`input/shards.py`), the output is the shard's own until `finalize` finds all
shards complete.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.batch.finished_job import FinishedJob
from engine.batch.input.files import InputFiles, LineNames
from engine.batch.input.index import InputIndex, scan_input
from engine.batch.input.pending import PendingLines
from engine.batch.input.prefix_hashes import PrefixHasher
from engine.batch.input.shards import InputShard, refuse_retry_of_shards, shard_outputs
from engine.batch.job_checks import check_output, check_tokenizer
from engine.batch.job_identity import make_manifest
from engine.batch.ledger import Ledger, ShardWriter, shards_dir
from engine.batch.manifest import (
    JobError,
    decide_start_or_resume,
    earlier_manifests,
    finalize,
    finished_errors,
    note_placement,
)
from engine.batch.on_rank_0 import describe, on_rank_0
from engine.batch.records.job_format import (
    choose_format,
    describe_form,
    error_file,
    error_file_of,
    make_writer,
)
from engine.batch.retry import ShardIsMerged, begin_from_output, continue_or_begin
from engine.batch.retry_rounds import RetryRequest, num_records
from engine.batch.shard_merge import is_merged, merge_if_complete, merge_lock
from engine.config import Config
from engine.distributed.errors import raise_on_any_rank
from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter
from engine.generation.prefix_cache import may_share_prefixes
from engine.generation.prefix_order import find_shared
from engine.request import Completion

logger = logging.getLogger(__name__)


class FileJob:
    """One rank's share of a job."""

    num_total = 0  # requests of the job
    num_resumed = 0  # of these, done by earlier runs
    num_retried = 0  # run again because their record was an error, also by earlier runs
    num_errors = 0  # error records of a job that `open` found complete
    lines: PendingLines  # set by `open`
    dealt: list[int] | None = None  # queue index at which each data rank's lines begin, and the
    # number of lines, where they are in prefix order; None: in input order, shared by all ranks
    shared_prefixes: dict[str, Any] | None = None  # of these lines, for the report

    def __init__(
        self,
        config: Config,
        topology: Topology,
        input_path: Path | Sequence[Path],
        output: Path,
        shard: InputShard | None = None,
        reporter: ProgressReporter | None = None,
        retry: RetryRequest | None = None,
    ) -> None:
        """Describe the job; nothing is read yet.

        Args:
            config: of the run.
            topology: of the run.
            input_path: the whole input: files, folders, or `-` for standard input.
            output: the whole output.
            shard: the shard of the input to run; None: all of it.
            reporter: reports the progress of work on files.
            retry: runs the lines of error records again; None: they stay.
        """
        self._reporter = reporter or ProgressReporter()
        self.output = output if shard is None else shard.output(output)
        given = [input_path] if isinstance(input_path, Path) else input_path
        self._files = InputFiles(given, self.output)
        self.input_path = self._files.path
        self._whole_output = output
        self._shard = shard
        self._retry = retry
        self._own_lines = range(0)
        self._config = config
        self._topology = topology
        self._ledger: Ledger | None = None
        self._manifest: dict[str, Any] = {}
        self._form: dict[str, Any] | None = None
        self._size = 0
        self._modified_ns = 0
        self._writer: ShardWriter | None = None

    def open(self, key: str, *, overwrite: bool) -> str:
        """Prepare to run; return "", or the reason where there is nothing to run.

        Takes as long as rank 0 needs to read the input. Collective over all ranks.

        Args:
            key: prefix of this run's keys in the store.
            overwrite: replace what exists at the output.

        Raises:
            JobError: the same on every rank.
        """
        topology, table = self._topology, np.empty((0, 4), dtype=np.int64)

        def scan() -> dict[str, Any]:
            nonlocal table
            found = self._scan(overwrite)
            if isinstance(found, str):
                return {
                    "done": found,
                    "total": self.num_total,
                    "errors": self.num_errors,
                    "form": describe_form(self._manifest),
                }
            table = found
            return {
                "pending": len(table),
                "total": self.num_total,
                "retried": self.num_retried,
                "size": self._size,
                "form": describe_form(self._manifest),
                "input": str(self.input_path),
                "starts": self._files.starts,
                "dealt": self.dealt,
                "shared_prefixes": self.shared_prefixes,
            }

        reporter = self._reporter
        reporter.begin("reading the input and the ledger")
        opened = on_rank_0(topology, f"{key}/open", scan, JobError, reporter)
        reporter.begin("opening the job")
        self.num_total, self._form = opened["total"], opened["form"]
        if "done" in opened:
            self.num_errors = opened["errors"]
            return opened["done"]
        self.num_resumed = opened["total"] - opened["pending"]
        self.num_retried = opened["retried"]
        self.input_path = Path(opened["input"])
        names = LineNames(opened["starts"])
        self.dealt, self.shared_prefixes = opened["dealt"], opened["shared_prefixes"]
        table = _broadcast_table(table, opened["pending"], topology)
        problem = None
        try:
            if (size := self.input_path.stat().st_size) != opened["size"]:
                raise ValueError(
                    f"--input {self.input_path}: has {size} bytes here and {opened['size']} on "
                    "rank 0; all hosts must see the same file"
                )
            self.lines = PendingLines(self.input_path, table, names)
            if topology.tensor.rank == 0:
                self._writer = ShardWriter(shards_dir(self.output), topology.data_rank)
                self._writer.to_record = make_writer(self._form, None)
        except FileNotFoundError as error:
            problem = (
                f"{error.filename}: does not exist on {topology.host}, only on rank 0's host; "
                "input and output must be on a file system that all hosts share"
            )
        except (OSError, ValueError) as error:
            problem = f"on {topology.host}: {describe(error)}"
        reporter.wait()
        raise_on_any_rank(topology.host_world, problem, JobError)
        return ""

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Write the tokens of log probabilities with the model's tokenizer, or None."""
        if self._writer is not None:
            self._writer.to_record = make_writer(self._form, tokenizer)

    @property
    def error_file(self) -> Path | None:
        """The file next to this job's output that has its error records; None: the output has."""
        return None if self._form is None else error_file(self.output)

    def errors_in(self) -> Path:
        """Return the file with the error records of the whole job; known once it is open."""
        output = self._whole_output
        return output if self._form is None else error_file(output)

    def write(self, completions: list[Completion]) -> None:
        """Make the records of finished requests durable. Raises OSError."""
        assert self._writer is not None, "only the first rank of a tensor group finishes requests"
        for completion in completions:
            if completion.error is not None and completion.error["line"] is None:
                completion.error["line"] = self.lines.number_of(completion.index)
            if completion.error is not None:
                line, name = self.lines.names.place(completion.error["line"])
                if name is not None:
                    completion.error |= {"line": line, "file": name}
        self._writer.append(completions)

    def note_placement(self, change: dict[str, Any]) -> None:
        """Append a change of the copies of experts to the job's manifest; on rank 0."""
        if self._ledger is not None:
            try:
                note_placement(self._ledger, change)
            except OSError as error:  # it is a note: the records do not need it
                logger.warning("the manifest cannot note a change of copies: %s", error)

    def close(self) -> None:
        """Close the input and this rank's ledger shard."""
        self.lines.close()
        if self._writer is not None:
            self._writer.close()

    def merge(self) -> int:
        """Write the output; return how many records are errors.

        Rank 0 only, once every rank has closed.

        Raises:
            OSError: a file cannot be read or written.
            ValueError: the input was changed, or a record is missing.
        """
        assert self._ledger is not None, "only rank 0 merges"
        if (now := self.input_path.stat()).st_mtime_ns != self._modified_ns:
            raise ValueError(
                f"--input {self.input_path}: was written to while the job ran ({now.st_size} "
                "bytes); run the same command again to check whether its content has changed"
            )
        return self._ledger.merge(self._own_lines, self._reporter.advance)

    def finalize(self, num_errors: int) -> str:
        """Mark the output complete and remove the ledger; return what to print about it.

        Rank 0 only, its last step. Raises OSError and JobError.
        """
        assert self._ledger is not None, "only rank 0 finalizes"
        finalize(self._ledger, self._manifest, num_errors)
        self._ledger.close()
        self._files.remove()
        return self._merge_shards()

    def _merge_shards(self) -> str:
        """Merge the input shards if all are complete; return the outcome, "" without shards."""
        if self._shard is None:
            return ""
        count, report = self._shard.count, self._reporter.advance
        outcome = merge_if_complete(self._whole_output, count, self._manifest, report)
        return f"slice {self._shard} is complete; {outcome}"

    def _scan(self, overwrite: bool) -> np.ndarray | str:
        """Open input and ledger on rank 0; return the table of pending lines, or the reason where
        there is nothing to run.
        """
        try:
            found = self._scan_files(overwrite)
        except BaseException:
            self._files.discard()
            raise
        if isinstance(found, str):
            self._files.remove()
        else:
            self._files.accept()
            self.input_path = self._files.path
        return found

    def _scan_files(self, overwrite: bool) -> np.ndarray | str:
        for path in self._files.given:
            check_output(self._whole_output, path)
        if self._shard is not None and overwrite:
            raise JobError(
                f"--slice {self._shard} --overwrite: would discard what other slices have done; "
                f"remove {self._whole_output} and {self._whole_output.name}.slice-*, or use "
                "another --output"
            )
        if self._shard is None and self._retry is not None:
            refuse_retry_of_shards(self._whole_output)
        self._files.prepare(self._reporter.advance)
        self.input_path = self._files.path
        check_tokenizer(self._config.model, self.input_path, self._files.names())
        hasher = PrefixHasher() if self._config.scheduler.prefix_cache else None
        on_lines = None if hasher is None else hasher.add
        index = scan_input(self.input_path, self._reporter.advance, on_lines)
        self._manifest = make_manifest(index, self._config, self._reporter.advance)
        if self._files.is_spooled:
            self._manifest["input"]["path"] = self._files.names()
        wanted, overwritten = self._config.batch.format, overwrite and self._shard is None
        outputs = [self.output]
        if self._shard is not None:  # any of them may have begun the job
            outputs = [self._whole_output, self.output, *shard_outputs(self._whole_output)]
        earlier = (
            each
            for output in outputs
            for each in earlier_manifests(output, self._manifest, overwrite=overwritten)
        )
        choose_format(self._manifest, index, wanted, earlier, LineNames(self._files.starts))
        self._size, self._modified_ns = index.size, index.modified_ns
        self._own_lines = range(len(index))
        if self._shard is not None:
            self._own_lines = self._shard.lines(len(index))
            if is_merged(self._whole_output, self._shard, self._manifest):
                self.num_total = len(index)
                self.num_errors = finished_errors(self._whole_output)
                return self._finished().merged_already()
        self.num_total = len(self._own_lines)
        ledger = Ledger(self.output)
        ledger.error_file = error_file_of(self.output, self._manifest)
        try:
            action = decide_start_or_resume(
                ledger, self._manifest, overwrite=overwrite, retry=self._retry
            )
            if action == "complete":
                ledger.close()
                self.num_errors = finished_errors(self.output)
                return self._finished().complete_already(self._merge_shards)
            if action == "retry":
                self._begin_retry(ledger, index)
            ledger.create_shards(self._topology.num_data)
            rounds = continue_or_begin(ledger, self._retry, self._reporter.advance)
            self.num_retried = num_records(rounds)
            done_n = ledger.done(len(index), self._reporter.advance)
        except BaseException:
            ledger.close()
            raise
        self._ledger = ledger
        table = PendingLines.select(index, done_n, self._own_lines)
        return table if hasher is None else self._deal(table, hasher)

    def _deal(self, table: np.ndarray, hasher: PrefixHasher) -> np.ndarray:
        """Return the pending lines rank by rank in prefix order, if they share prefixes."""
        prefixes = hasher.finish().select(table[:, 0])
        if (shared := find_shared(prefixes)) is None or not may_share_prefixes(self._config):
            return table
        dealt_n, self.dealt = shared.deal(prefixes.sizes_n, self._topology.num_data)
        self.shared_prefixes = {
            "lines": shared.num_sharing,
            "prefixes": shared.num_prefixes,
            "prompt_share": round(shared.saved, 4),
        }
        return table[dealt_n]

    def _begin_retry(self, ledger: Ledger, index: InputIndex) -> None:
        """Turn the finished output into an unfinished job without its error records."""
        assert self._retry is not None, "decided only for a request to retry"
        lines, report, shard = self._own_lines, self._reporter.advance, self._shard
        # Another shard that ends now would merge this one with its errors.
        lock = nullcontext() if shard is None else merge_lock(self._whole_output, report)
        try:
            begin_from_output(ledger, self._manifest, self._retry, index, lines, lock, report)
        except ShardIsMerged as error:
            raise JobError(self._finished().merged_refusal()) from error

    def _finished(self) -> FinishedJob:
        return FinishedJob(
            output=self.output,
            whole_output=self._whole_output,
            shard=self._shard,
            retry=self._retry,
            num_total=self.num_total,
            num_errors=self.num_errors,
        )


def _broadcast_table(table: np.ndarray, length: int, topology: Topology) -> np.ndarray:
    """Return rank 0's table, int64 [length, 4], on every rank. Collective over all ranks."""
    if topology.world.size == 1 or length == 0:
        return table
    shared = torch.from_numpy(table) if topology.world.rank == 0 else torch.empty(length, 4).long()
    shared = shared.to(topology.device)
    dist.broadcast(shared, src=0, group=topology.world.handle)
    # SYNC: once per job; the table is host data, on the device only for the broadcast.
    return shared.cpu().numpy()
