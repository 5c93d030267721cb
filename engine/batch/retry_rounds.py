"""Retry rounds: which requests for `--retry-errors` a job has had, as its manifest lists them.

A round begins with a request of a user, lasts until the output is complete, and is continued by
every run until then, also by other requests. A launcher that starts a run again repeats its
request; such a run must not begin another round where it finds the output complete. So a round
lists what the launchers started and how often they had restarted it:

    "retries": [{"round": 1, "records": 4, "requests": [{"slurm": ["4321.0", 0]}]}]

In the manifest of a ledger, the last round is not finished. Its `void_before` gives a byte offset
per ledger shard: the error records before it do not count, as their lines are to run again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "retries"  # in the manifest


@dataclass(frozen=True, slots=True)
class RetryRequest:
    """A request to run the lines of error records again."""

    starts: dict[str, list[Any]]  # launcher -> [what it started, how often it has restarted it]

    @classmethod
    def of_process(cls, environ: Mapping[str, str] = os.environ) -> RetryRequest:
        """Return the request of this process, started by the launchers in `environ`."""
        starts: dict[str, list[Any]] = {}
        if job := environ.get("SLURM_JOB_ID"):  # kept when the job is requeued; its steps, too
            name = f"{job}.{environ.get('SLURM_STEP_ID', '')}"
            starts["slurm"] = [name, _count(environ, "SLURM_RESTART_COUNT")]
        if (run := environ.get("TORCHELASTIC_RUN_ID")) is not None:  # may be "none" for every run
            name = f"{run} {os.uname().nodename} {_parent()}"
            starts["torchrun"] = [name, _count(environ, "TORCHELASTIC_RESTART_COUNT")]
        return cls(starts)

    def is_restart_of(self, rounds: list[dict[str, Any]]) -> bool:
        """Return whether an earlier start of this very request had one of the rounds."""
        for earlier in (request for each in rounds for request in _requests(each)):
            for launcher, (name, restarts) in self.starts.items():
                match earlier.get(launcher):
                    case [str(other), int(before)] if other == name and before < restarts:
                        return True
        return False


def rounds_of(manifest: Any) -> list[dict[str, Any]]:
    """Return the rounds in a manifest, [] where it has none or is none."""
    found = manifest.get(KEY) if isinstance(manifest, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def with_round(
    rounds: list[dict[str, Any]], request: RetryRequest, num_records: int, void: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the rounds with a new one.

    Args:
        rounds: earlier ones.
        request: for the new one.
        num_records: error records whose lines it runs again.
        void: `void_before` of the new one.
    """
    number = 1 + max((_number(each, "round") for each in rounds), default=0)
    new = {"round": number, "records": num_records, "requests": _starts(request)}
    return [*rounds, {**new, "void_before": void}]


def with_request(rounds: list[dict[str, Any]], request: RetryRequest) -> list[dict[str, Any]]:
    """Return the rounds, the last of which is continued by this request too."""
    *others, last = rounds
    earlier = _requests(last)
    more = [starts for starts in _starts(request) if starts not in earlier]
    return [*others, {**last, "requests": [*earlier, *more]}] if more else rounds


def finished(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rounds without what only a ledger needs."""
    return [{k: v for k, v in each.items() if k != "void_before"} for each in rounds]


def void_before(rounds: list[dict[str, Any]]) -> dict[str, int]:
    """Return `void_before` of the unfinished round of a ledger, {} without one."""
    found = rounds[-1].get("void_before") if rounds else None
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: offset for name, offset in pairs if isinstance(offset, int)}


def num_records(rounds: list[dict[str, Any]]) -> int:
    """Return how many lines the last round runs again, 0 without one."""
    return _number(rounds[-1], "records") if rounds else 0


def _starts(request: RetryRequest) -> list[dict[str, list[Any]]]:
    return [request.starts] if request.starts else []


def _requests(round_: dict[str, Any]) -> list[dict[str, Any]]:
    found = round_.get("requests")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _number(value: dict[str, Any], key: str) -> int:
    found = value.get(key)
    return found if isinstance(found, int) else 0


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _parent() -> str:
    """Return the id of this process's parent, torchrun's agent, and when it started."""
    parent, started = os.getppid(), ""
    with suppress(OSError, IndexError):  # without /proc, the id has to do
        # The name, in brackets, may hold anything; the start is the 20th value after it.
        fields = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
        started = fields.rpartition(")")[2].split()[19]
    return f"{parent} {started}".rstrip()
