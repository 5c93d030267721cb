"""Fixture of the tests in this folder: the correct output of a job."""

from __future__ import annotations

import subprocess
import sys

import pytest
from chaos.job import Job, read_lines


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The records that one process, without a launcher, writes for the module's `job`."""
    output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    done = subprocess.run([sys.executable, *job.command(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read_lines(output)
