"""Fixtures of the batch job's tests: the job's files, and the records of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.batch_case import command, make_batch_job, records, run


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random model, its config and an input of good and bad lines."""
    path = tmp_path_factory.mktemp("job")
    make_batch_job(path)
    return path


@pytest.fixture(scope="session")
def undisturbed(job: Path) -> list[dict[str, Any]]:
    """The records of an undisturbed run on one rank."""
    output = job / "undisturbed.jsonl"
    ((code, _, err),) = run(1, command(job, output))
    assert code == 0, err
    return records(output)
