"""A job without an input file: a few built-in prompts, to see the engine work.

Has the methods of `file_job.py`'s `FileJob`, but no ledger: records are sent to rank 0 through the
store, and rank 0 prints them.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from engine.batch.atomic_files import write_text
from engine.batch.input.pending import Line
from engine.batch.job_checks import check_output
from engine.batch.manifest import JobError, sibling_path
from engine.batch.on_rank_0 import on_rank_0
from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter
from engine.request import Completion

# Something for any model, and four tasks that the bundled ones were trained on.
PROMPTS = (
    "def fibonacci(n):",
    "The capital of France is",
    'class Queue:\n    """A first-in, first-out queue."""\n\n    def __init__(self',
    "sum: 47 + 38 =",
    "copy: queen stone clay bone clay apple =>",
    "recall: black shoe, heart car, cat school, hat flag, ring hair, map cake, army milk? ring",
    "brackets: [ { } ] { ( ) [ =>",
)


class _PromptLines:
    """The built-in prompts as lines of an input."""

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, queue_index: int) -> Line:
        raw = json.dumps({"id": queue_index, "prompt": PROMPTS[queue_index]}).encode()
        return Line(queue_index, queue_index + 1, raw)


class PromptJob:
    """One rank's share of the job of the built-in prompts; same steps as `FileJob`."""

    num_total = len(PROMPTS)
    num_resumed = 0
    num_retried = 0
    num_errors = 0  # before it has run
    dealt = None
    shared_prefixes = None

    def __init__(
        self, topology: Topology, console: Console, output: Path | None, reporter: ProgressReporter
    ) -> None:
        self.lines = _PromptLines()
        self.output = output
        self._topology = topology
        self._reporter = reporter
        self._console = console
        self._key = ""

    def open(self, key: str, *, overwrite: bool) -> str:
        """Check the output; return "", as there is always something to run.

        Raises JobError. Collective over all ranks.
        """
        self._key = f"{key}/record"

        def check() -> None:
            if self.output is None:
                return
            check_output(self.output)
            if self.output.exists() and not overwrite:
                raise JobError(f"--output {self.output}: exists; use --overwrite to replace it")

        on_rank_0(self._topology, f"{key}/open", check, JobError, self._reporter)
        return ""

    @property
    def error_file(self) -> Path | None:
        """None: error records are printed, or written, with the others."""
        return None

    def errors_in(self) -> Path | None:
        """Return the file with the error records, None without an output."""
        return self.output

    def write(self, completions: list[Completion]) -> None:
        """Send finished records to rank 0."""
        for completion in completions:
            record = json.dumps(completion.record())
            self._topology.store.set(f"{self._key}/{completion.index}", record)

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def merge(self) -> int:
        """Print the completions and write them if asked to; return how many are errors.

        Rank 0 only, once every rank has closed. Raises OSError.
        """
        texts = [self._topology.store.get(f"{self._key}/{index}") for index in range(len(PROMPTS))]
        records = [json.loads(text) for text in texts]
        for prompt, record in zip(PROMPTS, records, strict=True):
            error = record.get("error", {}).get("message", "")
            text = record["text"].replace("\x1b", "\ufffd")  # a model must not drive the terminal
            body = Text.assemble((prompt, "dim"), text, (error, "red"))
            usage, reason = record["usage"], record["finish_reason"]
            subtitle = f"{usage['completion_tokens']} tokens, {reason}"
            self._console.print(Panel(body, subtitle=subtitle, subtitle_align="right"))
        if self.output is not None:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_text(self.output, "".join(lines))
            sibling_path(self.output, "job.json").unlink(missing_ok=True)
        return sum(record["finish_reason"] == "error" for record in records)

    def finalize(self, num_errors: int) -> str:
        """Return "": there is no ledger to remove and nothing more to print."""
        return ""
