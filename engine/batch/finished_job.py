"""What is printed about a job, or its input shard, that is complete before it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.batch.input.shards import InputShard
from engine.batch.manifest import JobError, output_rounds
from engine.batch.retry_rounds import RetryRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedJob:
    """A complete output, as the messages about it need it."""

    output: Path  # of the job, or of its shard
    whole_output: Path
    shard: InputShard | None
    retry: RetryRequest | None
    num_total: int  # records
    num_errors: int  # of these, error records

    def complete_already(self, merge_shards: Callable[[], str]) -> str:
        """Return what to print where the job, or its shard, is complete; merge the shards.

        Args:
            merge_shards: merges the shards if all are complete and returns the outcome; called
                only for a shard.
        """
        rounds, shard = output_rounds(self.output), self.shard
        if shard is None:
            found = self._errors_left(rounds, "--retry-errors", "its")
            again = "--overwrite runs the job again"
            join = ", " if self.num_errors else "; "
            return f"{self.output} is already complete{found and '; '}{found}{join}{again}"
        found = self._errors_left(rounds, f"--slice {shard} --retry-errors", "the slice's")
        outcome = merge_shards()
        # Merged, the errors are counted where the output is found complete.
        return f"{outcome}; {found}" if found and self.output.exists() else outcome

    def merged_already(self) -> str:
        """Return what to print where the shards are merged. Raises JobError for errors to retry."""
        rounds = output_rounds(self.whole_output)
        if self.retry is not None and self.num_errors and not self.retry.is_restart_of(rounds):
            raise JobError(self.merged_refusal())
        found = self._errors_left(rounds, "--retry-errors without --slice", "the")
        return f"{found}{found and '; '}{self.whole_output} is already complete"

    def merged_refusal(self) -> str:
        """Return why a shard that is merged cannot be retried."""
        return (
            f"--slice {self.shard} --retry-errors: the slices are merged into "
            f"{self.whole_output}; give --retry-errors without --slice"
        )

    def _errors_left(self, rounds: list[dict[str, Any]], flags: str, whose: str) -> str:
        """Return what to print about the error records of a complete output, "" for nothing.

        Args:
            rounds: that the output has had.
            flags: run the lines again.
            whose: records these are.
        """
        if not self.num_errors:
            return "" if self.retry is None else "no error records to run again"
        done = self.retry is not None and self.retry.is_restart_of(rounds)
        before = "after this request's retry, " if done else ""
        are = f"{self.num_errors} of {whose} {self.num_total} records are errors"
        return f"{before}{are}: {flags} runs their lines again"
