"""Runs one case in a child process, which a hang or a crash does not outlive."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.fuzz.generators import GENERATORS, Case

# docs/batch.md; 1 is a failure of the machine, which no input may cause.
ALLOWED = {0, 2, 3}
HANG_S = 90.0
_MEMORY = 16 << 30  # address space of a child: a case that asks for more fails instead of the host


class Base:
    """The small job that cases change: a model with tokenizer, and an input."""

    def __init__(self, folder: Path) -> None:
        from tests.helpers.batch_case import make_batch_job

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        make_batch_job(folder)

    def problem(self, generator: str, seed: int, folder: Path) -> str | None:
        """Run one case in `folder`; return what is wrong with how it ended, None if nothing."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        (folder / "in.jsonl").write_text('{"id": 1, "prompt": "ab", "max_new_tokens": 2}\n')
        case = GENERATORS[generator](folder, random.Random(f"{generator} {seed}"))
        code, seconds = _run_child(folder, case)
        text = (folder / "stderr").read_text(errors="replace")
        if code is None:
            return f"does not end within {HANG_S:g} s:\n{text[-1500:]}"
        if "Traceback" in text or code not in ALLOWED:
            return f"exit code {code} after {seconds:.1f} s:\n{text[-3000:]}"
        if code == 2 and "\nerror: " not in f"\n{text}":  # libraries may warn before it
            return f"exit code 2 without a message:\n{text[-1500:]}"
        if not case.num_lines:
            return None
        if code == 2:
            return f"lines that are wrong ended the job:\n{text[-1500:]}"
        check = _check_pair if case.records == "openai" else _check_records
        return check(folder / "out.jsonl", case.num_lines)


def _check_records(output: Path, num_lines: int) -> str | None:
    records = _read(output)
    if len(records) != num_lines:
        return f"{num_lines} lines have {len(records)} records"
    return _check_errors([record.get("error") for record in records])


def _check_pair(output: Path, num_lines: int) -> str | None:
    """Return what is wrong with the two files of a job in OpenAI's form, None if nothing."""
    from engine.batch.records.job_format import error_file

    good, bad = _read(output), _read(error_file(output))
    for records in (good, bad):
        if records != sorted(records, key=_index):
            return "the records are not in the order of the input"
    if sorted(map(_index, [*good, *bad])) != list(range(num_lines)):
        return f"{num_lines} lines have {len(good)} records and {len(bad)} error records"
    try:
        for record in good:
            _parse_body(record)
    except ValueError as error:
        return f"the types of the package openai refuse a record: {error}"
    return _check_errors([each["error"] or each["response"]["body"]["error"] for each in bad])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _index(record: dict[str, Any]) -> int:
    return int(record["id"][-8:], 16)


def _parse_body(record: dict[str, Any]) -> None:
    """Raise ValueError where a body is none that the official package's types describe."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    body = record["response"]["body"]
    if body["object"] == "chat.completion":
        ChatCompletion.model_validate(body, strict=True)
        return
    for choice in body["choices"]:
        # Of a prompt's first token nothing is known: null in the API, and not in the type.
        logprobs = choice["logprobs"] or {}
        if logprobs.get("token_logprobs", [0.0])[:1] == [None]:
            logprobs["token_logprobs"][0] = 0.0
            logprobs["top_logprobs"] = [each or {} for each in logprobs["top_logprobs"] or []]
    Completion.model_validate(body, strict=True)


def _check_errors(errors: list[dict[str, Any] | None]) -> str | None:
    from typing import get_args

    from engine.request import ErrorCode

    for error in errors:
        if error is not None and error["code"] not in get_args(ErrorCode):
            return f"an unknown code: {error}"
        if error is not None and error["code"] == "unreadable_line":
            return f"an error without a cause of its own: {error}"
    return None


def _run_child(folder: Path, case: Case) -> tuple[int | None, float]:
    """Return the exit code, None where it had to be killed, and the seconds."""
    begin = time.monotonic()
    child = os.fork()
    if not child:
        _in_child(folder, case)
    while time.monotonic() < begin + HANG_S:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), time.monotonic() - begin
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, HANG_S


def _in_child(folder: Path, case: Case) -> None:
    """Run the command in this process and end it."""
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        # pytest has put streams of its own in place of the process's.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        os.chdir(folder)
        from launch import infer

        argv = ["--config", "config.yaml", "--set", f"model.path={folder / 'model'}"]
        argv += ["--set", "sampling.max_new_tokens=2", "--set", "runtime.timeout_s=30"]
        argv += ["--set", f"batch.format={case.records}"]
        argv += ["--input", "in.jsonl", "--output", "out.jsonl"]
        for override in case.overrides:
            argv += ["--set", override]
        code = infer.main(argv)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
