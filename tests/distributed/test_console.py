"""A job ends as usual whatever becomes of the streams it prints to."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.batch_case import command, records

ROOT = Path(__file__).resolve().parents[2]
# infer.py with a line of progress in every step.
DRIVER = """
import runpy, sys
import engine.batch.progress as progress
progress._LINE_INTERVAL_S = progress._BAR_INTERVAL_S = 0.0
sys.argv[0] = "launch/infer.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def gone_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def gone_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


STREAMS: dict[str, Callable[[], int]] = {
    "full disk": full_disk,
    "gone reader": gone_reader,
    "gone terminal": gone_terminal,
}


def start(
    arguments: list[str],
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    closed: tuple[int, ...] = (),
    program: tuple[str, ...] = ("-c", DRIVER),
    **environ: str,
) -> subprocess.CompletedProcess[str]:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    try:
        return subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environ,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=close,
            text=True,
            timeout=120,
        )
    finally:
        for fd in {stdout, stderr} - {subprocess.PIPE}:
            os.close(fd)


# Every stream in `make test-long`.
FIRST, *MORE = STREAMS
OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in MORE]


@pytest.mark.parametrize("name", STREAMS)
def test_a_job_ends_as_usual_when_nothing_can_be_printed(job, undisturbed, tmp_path, name):
    output = tmp_path / "out.jsonl"
    done = start(command(job, output), STREAMS[name](), STREAMS[name]())
    assert done.returncode == 0
    assert records(output) == undisturbed
    assert not output.with_name("out.jsonl.parts").exists()


@pytest.mark.parametrize("name", [FIRST, *OTHERS])
def test_progress_that_cannot_be_printed_leaves_the_summary(job, tmp_path, name):
    done = start(command(job, tmp_path / "out.jsonl"), stderr=STREAMS[name]())
    assert done.returncode == 0
    assert "requests, 4 with an error record." in done.stdout.replace("\n", " ")


def test_a_summary_that_cannot_be_printed_is_reported_once(job, tmp_path):
    done = start(command(job, tmp_path / "out.jsonl"), stdout=full_disk())
    assert done.returncode == 0
    message = "standard output: No space left on device; what is printed there is lost\n"
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr


def test_closed_streams_never_become_the_ledger(job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    done = start(command(job, output), closed=(0, 1, 2))
    assert done.returncode == 0
    assert records(output) == undisturbed


def test_a_reader_that_does_not_read_does_not_stop_the_job(job, undisturbed, tmp_path):
    output, (read, write) = tmp_path / "out.jsonl", os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, b"x" * 4096)
    done = start(command(job, output), stderr=write)
    os.close(read)
    assert done.returncode == 0
    assert records(output) == undisturbed


def test_text_that_the_encoding_of_a_stream_lacks_is_escaped(job):
    argv = ["--config", str(job / "config.yaml")]
    done = start(argv, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert "The capital of France is" in done.stdout and "7 requests" in done.stdout


@pytest.mark.parametrize("name", STREAMS)
def test_a_users_mistake_has_its_exit_code_when_it_cannot_be_printed(name):
    assert start(["--config", "nothere"], STREAMS[name](), STREAMS[name]()).returncode == 2


def test_a_run_that_fails_has_its_exit_code_when_it_cannot_be_printed(job, tmp_path):
    fails = DRIVER.replace("runpy.run", "import engine.llm; engine.llm.LLM = None; runpy.run", 1)
    assert fails != DRIVER
    argv = command(job, tmp_path / "out.jsonl")
    assert start(argv, stderr=gone_reader(), program=("-c", fails)).returncode == 1


@pytest.mark.parametrize("what", ["--help", "--print-config"])
def test_what_is_only_printed_ends_quietly_with_its_reader(what):
    done = start(["--config", "tiny_mixtral", what], stdout=gone_reader())
    assert (done.returncode, done.stderr) == (0, "")
    done = start(["--config", "tiny_mixtral", what], closed=(1,))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_config_that_cannot_be_printed_is_an_error_in_words():
    done = start(["--config", "tiny_mixtral", "--print-config"], stdout=full_disk())
    assert done.returncode == 2
    assert "error: standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_that_is_printed_to_a_slow_reader_is_whole():
    expected = start(["--config", "tiny_mixtral", "--print-config"]).stdout
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    reader = subprocess.Popen(["sh", "-c", "sleep 3; cat"], stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    done = start(["--config", "tiny_mixtral", "--print-config"], stdout=write)
    assert done.returncode == 0
    assert reader.communicate()[0].decode() == expected
