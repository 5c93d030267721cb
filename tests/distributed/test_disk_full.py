"""A full disk: every file that a job writes is named, and nothing that is done is lost.

A link to /dev/full stands for a file on a disk without space.

python -m pytest tests/distributed/test_disk_full.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.batch_case import command, records, run

FULL = "No space left on device"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("out.jsonl.parts/manifest.json.tmp", 2),  # before anything runs
        ("out.jsonl.tmp", 1),
        ("out.jsonl.config.yaml.tmp", 1),
        ("out.jsonl.report.json.tmp", 1),
        ("out.jsonl.job.json.tmp", 1),
    ],
)
def test_a_file_that_cannot_be_written_is_named_and_the_job_resumes(
    job, undisturbed, tmp_path, name, code
):
    output, path = tmp_path / "out.jsonl", tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/dev/full")
    ((got, _, err),) = run(1, command(job, output))
    assert got == code and f"{path}: {FULL}; free space there" in err, err
    assert "Traceback" not in err
    path.unlink(missing_ok=True)
    ((got, _, err),) = run(1, command(job, output))
    assert got == 0, err
    assert records(output) == undisturbed


@pytest.mark.parametrize("mib", [0.001, 64])  # a file that is replaced as it grows, and one
def test_a_span_file_that_cannot_be_written_is_named_and_the_job_goes_on(job, tmp_path, mib):
    spans = tmp_path / "spans" / "spans.rank00000.jsonl"
    spans.parent.mkdir()
    spans.symlink_to("/dev/full")
    settings = ["--set", f"profiler.spans={spans.parent}", "--set", f"profiler.spans_mib={mib}"]
    ((code, _, err),) = run(1, command(job, Path(tmp_path, "out.jsonl"), *settings))
    assert code == 0 and str(spans) in err and FULL in err, err
    assert "Traceback" not in err
