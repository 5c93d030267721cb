"""Input shards: one input over several runs that do not communicate, such as a job array.

    launch/infer.py --slice 3/16     the fourth of 16 equal, contiguous shards of the requests

A shard is a job of its own, with the output `<output>.slice-00003-of-00016` and a ledger next to
it. Requests keep their index in the whole input: seeds, duplicates and line numbers are those of a
run without shards. The last run merges the shards (`shard_merge.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.batch.ledger import shards_dir
from engine.batch.manifest import JobError

SHARD_SUFFIX = re.compile(r"\.slice-(\d{5})-of-(\d{5})(.*)")
MAX_SHARDS = 99_999


@dataclass(frozen=True, slots=True)
class InputShard:
    """One of `count` contiguous shards of an input."""

    index: int  # from 0
    count: int

    @classmethod
    def parse(cls, text: str) -> InputShard:
        """Return the shard that `I/N` names. Raises JobError."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise JobError(
                f"--slice {text}: must be I/N with 0 <= I < N <= {MAX_SHARDS}; the first of 16 is "
                "0/16"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def lines(self, total: int) -> range:
        """Return the shard's share of `total` requests; a remainder goes to the first shards."""
        size, more = divmod(total, self.count)
        first = self.index * size + min(self.index, more)
        return range(first, first + size + (self.index < more))

    def output(self, output: Path) -> Path:
        """Return the path of the shard's own output."""
        return output.with_name(f"{output.name}.slice-{self.index:05d}-of-{self.count:05d}")


def refuse_retry_of_shards(output: Path) -> None:
    """Raise JobError where a retry without a shard would begin a job that has shards already."""
    if not output.exists() and not has_unsharded_run(output) and (counts := counts_beside(output)):
        raise JobError(
            f"--retry-errors: next to {output} are slices of {min(counts)}, not merged yet; give "
            f"--slice I/{min(counts)} too, or first finish the slices with --slice alone"
        )


def shard_outputs(output: Path) -> list[Path]:
    """Return the outputs of the shards that are next to the whole output, also unfinished ones."""
    names = {path.name[: len(path.name) - len(match[3])] for path, match in _shard_files(output)}
    return [output.with_name(name) for name in sorted(names)]


def counts_beside(output: Path) -> set[int]:
    """Return into how many shards those next to the output, unfinished or complete, divide it."""
    return {int(match[2]) for _, match in _shard_files(output)}


def _shard_files(output: Path) -> list[tuple[Path, re.Match[str]]]:
    """Return the files of shards, without copies of the input, which hold no results."""
    found = files_like(SHARD_SUFFIX, output)
    return [(path, match) for path, match in found if not match[3].startswith(".input.json")]


def has_unsharded_run(output: Path) -> bool:
    """Return whether a run without shards has records of this output."""
    return shards_dir(output).joinpath("manifest.json").exists()


def refuse_unsharded_run(output: Path) -> None:
    """Raise JobError where a run without shards has records of this output."""
    if has_unsharded_run(output):
        raise JobError(
            f"--slice: {shards_dir(output)} belongs to a run without --slice; finish that one with "
            "its own command, or use another --output"
        )


def files_like(suffix: re.Pattern[str], output: Path) -> list[tuple[Path, re.Match[str]]]:
    """Return the files next to the output whose name is the output's with such a suffix."""
    found = []
    for path in output.parent.iterdir():
        if path.name.startswith(output.name):
            match = suffix.fullmatch(path.name, len(output.name))
            if match is not None:
                found.append((path, match))
    return found
