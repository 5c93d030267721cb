"""lockstep doctor: every finding is a row, whatever fails, and the exit code says what matters.

Run: pytest tests/unit/test_doctor.py
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.config.loader import load_config
from engine.doctor import checks, report
from engine.doctor.findings import Absent, Finding, check_one, table_lines
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def rows_of(text: str) -> dict[str, str]:
    """The table: name -> mark and text, of the first line of each row."""
    rows = (re.match(r"\S+ +(.+?) +((?:ok|FAILS|-) .*)", line) for line in text.splitlines())
    return {row[1]: row[2] for row in rows if row}


def run_program(*command: str) -> tuple[int, str]:
    path = f"{ROOT / 'launch'}{os.pathsep}{ROOT}"
    result = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert "Traceback" not in result.stdout + result.stderr
    return result.returncode, result.stdout


def test_a_check_that_raises_anything_is_a_finding():
    def fail(error: Exception):
        raise error

    assert check_one("works", "x", lambda: "good").works is True
    assert check_one("works", "x", lambda: fail(Absent("not there"))).works is None
    found = check_one("works", "x", lambda: fail(KeyError("no\nmore")), is_needed=True)
    assert found.works is False and found.is_needed and "no" in found.text
    assert check_one("works", "x", lambda: fail(OSError())).text == "OSError"


def test_ranks_that_differ_are_shown_in_the_row():
    def findings(triton: bool) -> list[Finding]:
        return [
            Finding("installed", "torch", "2.13.0", True),
            Finding("installed", "triton", "3.7.1" if triton else "not installed", triton or None),
        ]

    assert table_lines([findings(True)] * 2) == [
        "installed torch  ok    2.13.0",
        "installed triton ok    3.7.1",
    ]
    assert table_lines([findings(True), findings(False), findings(True)]) == [
        "installed torch  ok    2.13.0",
        "installed triton ok    ranks 0, 2: 3.7.1",
        "                 -     rank 1: not installed",
    ]


def test_numbers_that_are_wrong_are_found():
    with pytest.raises(RuntimeError, match="its numbers are wrong: off by 1"):
        checks._compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    with pytest.raises(RuntimeError, match="numbers are wrong"):
        checks._compare(torch.tensor([float("nan")]), torch.tensor([1.0]))


def test_a_backend_that_computes_wrong_numbers_fails_and_is_needed_where_it_is_used(monkeypatch):
    make = checks.make_backend

    def broken(name, weights):
        run = make(name, weights)
        return (lambda *args: run(*args) + 1) if name == "torch" else run

    monkeypatch.setattr(checks, "make_backend", broken)
    found = {each.name: each for each in checks.check_works(CPU, None)}
    assert found["experts: torch"].works is False and found["experts: torch"].is_needed
    assert found["experts: grouped_mm"].works and not found["experts: grouped_mm"].is_needed
    assert found["experts: te"].works is None


def test_what_a_config_asks_for_and_cannot_have_is_said_with_code_1():
    asked = ("--config", "tiny_mixtral", "--set", "moe.experts.backend=te")
    code, text = run_program("engine.doctor", *asked)
    rows = rows_of(text)
    assert code == 1 and rows["experts backend"].startswith("FAILS moe.experts.backend: 'te'")
    assert rows["checkpoint"].startswith("ok "), "the rest is checked all the same"


def test_lockstep_doctor_is_the_same_and_a_config_that_is_not_there_is_a_row():
    code, text = run_program("lockstep", "doctor", "--config", "nonsuch")
    assert code == 1 and rows_of(text)["config"].startswith("FAILS config nonsuch: no such file")


def test_what_a_config_would_use_is_said():
    config = load_config("tiny_mixtral", [])
    found = {each.name: each for each in report._chosen(config, CPU, 2)}
    assert all(each.works for each in found.values())
    assert found["experts backend"].text == "torch in float32"
    too_few = load_config("tiny_mixtral_ep2", ["parallel.expert=3"])
    found = {each.name: each for each in report._chosen(too_few, CPU, 2)}
    assert found["ranks"].works is False and "multiple of 3" in found["ranks"].text


def run_on_a_rank(rank: int) -> tuple[int, str]:
    os.environ["LOCKSTEP_NATIVE"] = "1" if rank == 0 else "0"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = report.run()
    return code, printed.getvalue()


def test_two_ranks_print_one_table_with_what_differs_between_them():
    (code, text), (other_code, other_text) = run_ranks(run_on_a_rank, 2)
    assert code == other_code == 0 and other_text == ""
    rows = rows_of(text)
    assert {"torch", "CUDA", "NCCL", "triton", "transformer-engine", "megatron-core"} <= set(rows)
    assert rows["experts: torch"].startswith("ok ")
    assert "all-reduce and all-to-all, ranks: 2" in rows["process group"]
    assert "rank 1: native CPU kernels are switched off" in text
