"""Ranks that die, stop, hang, fail or skip a collective in the middle of a job: the others report
which rank and where, exit in time, and the job resumes from its ledger.

python -m pytest tests/distributed/test_faults.py

Real processes over gloo, three ranks, mostly started as by hand, so that rank 0 holds the store.
`fault_worker.py` injects the fault.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import (
    fault_worker,
    ranks,  # noqa: F401  its fork server has loaded the slow libraries
)

ROOT = Path(__file__).resolve().parents[2]
HOST = re.escape(socket.gethostname())
TIMEOUT_S = 5
MARGIN_S = 2.0  # for a continued process
NUM_LINES = 30
WORLD = 3
# Exchange, all-to-all and late read of some step in the middle.
CALL = {"skip": 7, "mismatch": 50, "kill reading": 6}
LAYER_CALL = 26  # of 4 per step: layer 1 of the 7th step
PROGRESS = r"step \d+, (layer \d+, )?[a-z]+, collective \d+"
IN_LAYER = r"step 6, layer 1, [a-z]+, collective \d+"


class Job:
    """One run of the job on several processes, and how each of them ended."""

    def __init__(self, folder: Path, argv: list[str], world: int = WORLD) -> None:
        """Start `fault_worker.py argv` on every rank, without a launcher."""
        context = multiprocessing.get_context("forkserver")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir()
        self.errs = [folder / f"err{rank}" for rank in range(world)]
        self.processes: list[Any] = []
        for rank, err in enumerate(self.errs):
            environ = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            process = context.Process(target=one_rank, args=(argv, environ, err), daemon=True)
            process.start()
            self.processes.append(process)

    def err(self, rank: int) -> str:
        return self.errs[rank].read_text() if self.errs[rank].exists() else ""

    def all_err(self) -> str:
        return "".join(map(self.err, range(len(self.errs))))

    def reports(self) -> list[str]:
        return re.findall(r"^fault: (.*)$", self.all_err(), re.MULTILINE)

    def codes(self, except_rank: int | None = None, within_s: float = 60.0) -> list[int]:
        """Return the exit codes in rank order, once all have exited."""
        deadline = time.monotonic() + within_s
        waited = [p for rank, p in enumerate(self.processes) if rank != except_rank]
        for process in waited:
            process.join(max(0.0, deadline - time.monotonic()))
        assert all(p.exitcode is not None for p in waited), f"still running:\n{self.all_err()}"
        return [process.exitcode for process in waited]

    def faulted_at(self, rank: int) -> float:
        """Wait for the fault; return when it happened."""
        deadline = time.monotonic() + 60
        while not (found := re.search(r"^fault at ([\d.]+)$", self.err(rank), re.MULTILINE)):
            assert time.monotonic() < deadline and self.processes[rank].is_alive(), self.all_err()
            time.sleep(0.01)
        return float(found[1])

    def end(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def one_rank(argv: list[str], environ: dict[str, str], err: Path) -> None:
    """Run the command as a rank, as if it was started by hand."""
    os.environ.update(environ)
    for stream, path in ((sys.stdout, Path(os.devnull)), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    try:
        fault_worker.run(argv)
    except SystemExit as done:
        sys.stderr.flush()
        os._exit(int(done.code or 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of the bundled model and an input of lines that finish a few at a time."""
    path = tmp_path_factory.mktemp("faults")
    (path / "config.yaml").write_text(
        f"model: {{path: {ROOT / 'configs/checkpoints/tiny_mixtral'}, dtype: float32}}\n"
        # What is cached, and so what a record counts, depends on where a job was interrupted.
        "scheduler: {max_sequences: 3, prefix_cache: false}\n"
        "sampling: {ignore_eos: true}\n"
        f"runtime: {{device: cpu, timeout_s: {TIMEOUT_S}}}\n"
    )
    lines = [
        {"id": f"r{number}", "prompt": "def f(x):" + " x" * number, "max_tokens": 2 + number % 5}
        for number in range(NUM_LINES)
    ]
    (path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(folder: Path, output: Path, *more: str) -> list[str]:
    files = ["--input", str(folder / "in.jsonl"), "--output", str(output)]
    return ["--config", str(folder / "config.yaml"), *files, *more]


def finish(folder: Path, output: Path) -> list[dict[str, Any]]:
    """Run the same command without a fault, on one rank; return the records."""
    job = Job(output.parent / "again", ["none", "0", "0", *command(folder, output)], 1)
    assert job.codes() == [0], job.all_err()
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[dict[str, Any]]:
    (folder / "undisturbed").mkdir()
    records = finish(folder, folder / "undisturbed" / "out.jsonl")
    assert [record["id"] for record in records] == [f"r{n}" for n in range(NUM_LINES)]
    return records


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Any]:
    jobs: list[Job] = []

    def start(fault: str, victim: int, *more: str, world: int = WORLD) -> Job:
        call = CALL.get(fault, LAYER_CALL)
        argv = [fault, str(victim), str(call), *command(folder, tmp_path / "out.jsonl", *more)]
        jobs.append(Job(tmp_path / "ranks", argv, world))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def one_report(job: Job, victim: int) -> str:
    """Return the only report, once the survivors have exited with exit code 1."""
    job.faulted_at(victim)
    codes = job.codes(except_rank=victim)
    assert codes == [1] * len(codes), job.all_err()
    assert len(job.reports()) == 1, job.all_err()
    survivors = (job.err(rank) for rank in range(len(job.errs)) if rank != victim)
    assert not any("Traceback" in err for err in survivors), job.all_err()
    return job.reports()[0]


def resumed(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    output = tmp_path / "out.jsonl"
    assert not output.exists()
    records = finish(folder, output)
    report = json.loads(output.with_name("out.jsonl.report.json").read_text())
    assert 0 < report["resumed"] < NUM_LINES, "the fault came in the middle"
    return records


# As ranks on several hosts, and all with GPUs: they wait in collectives of another library.
OVER_GLOO = ("--set", "runtime.shared_memory=false")
VICTIMS = pytest.mark.parametrize(
    ("victim", "settings"),
    [
        pytest.param(1, (), id="a rank"),
        pytest.param(0, (), id="the rank with the store"),
        pytest.param(1, OVER_GLOO, id="a rank, over gloo", marks=pytest.mark.long),
    ],
)


@VICTIMS
def test_a_killed_rank_is_named_with_its_last_progress_and_the_job_resumes(
    folder, undisturbed, start, tmp_path, victim, settings
):
    job = start("kill", victim, *settings)
    report = one_report(job, victim)
    silence = "has published no heartbeat" if victim else "which holds the store, has not answered"
    assert re.match(rf"rank {victim} on {HOST},? {silence}", report), report
    assert re.search(f"last seen in {IN_LAYER}", report), report
    assert job.processes[victim].exitcode == -signal.SIGKILL
    assert resumed(folder, tmp_path) == undisturbed


@pytest.mark.parametrize("fault", ["kill reading", pytest.param("kill", marks=pytest.mark.long)])
def test_a_rank_that_dies_with_a_step_in_flight_is_named_and_the_job_resumes(
    folder, undisturbed, start, tmp_path, fault
):
    job = start(fault, 1, "--set", "scheduler.async_scheduling=on")
    report = one_report(job, 1)
    assert re.match(rf"rank 1 on {HOST},? has published no heartbeat", report), report
    place = IN_LAYER if fault == "kill" else PROGRESS
    assert re.search(f"last seen in {place}", report), report
    assert job.processes[1].exitcode == -signal.SIGKILL
    assert resumed(folder, tmp_path) == undisturbed


@pytest.mark.long
@pytest.mark.parametrize("fault", ["kill", "raise", "hang"])
def test_a_rank_that_fails_in_transformers_layers_is_named_with_its_layer(folder, start, fault):
    job = start(fault, 1, "--set", "model.implementation=transformers")
    report = one_report(job, 1)
    said = {
        "kill": "has published no heartbeat",
        "raise": f"failed in {IN_LAYER}: ArithmeticError: the experts summed to 7",
        "hang": f"has been at {IN_LAYER} for ",
    }
    assert re.match(f"rank 1 on {HOST},? {said[fault]}", report), report
    assert re.search(IN_LAYER, report), report


@VICTIMS
@pytest.mark.long
def test_a_stopped_rank_is_named_and_exits_too_when_it_is_continued(
    folder, undisturbed, start, tmp_path, victim, settings
):
    job = start("stop", victim, *settings)
    report = one_report(job, victim)
    assert re.match(rf"rank {victim} on {HOST}", report) and "stopped" in report
    assert re.search(f"last seen in {IN_LAYER}", report), report
    os.kill(job.processes[victim].pid, signal.SIGCONT)
    assert job.codes()[victim] == 1
    assert len(job.reports()) == 1, "the continued rank reports no other"
    assert f"rank {victim} on" in job.err(victim)
    assert resumed(folder, tmp_path) == undisturbed


def test_a_rank_that_is_continued_in_time_finishes_the_job_undisturbed(
    undisturbed, start, tmp_path
):
    job = start("stop", 1)
    job.faulted_at(1)
    time.sleep(1.5)
    os.kill(job.processes[1].pid, signal.SIGCONT)
    assert job.codes() == [0, 0, 0], job.all_err()
    assert not job.reports()
    output = tmp_path / "out.jsonl"
    assert [json.loads(line) for line in output.read_text().splitlines()] == undisturbed


@pytest.mark.parametrize("victim", [1, 0], ids=["a rank", "the rank with the store"])
def test_an_exception_in_one_rank_is_reported_by_the_others_with_its_text(
    folder, undisturbed, start, tmp_path, victim
):
    job = start("raise", victim)
    report = one_report(job, victim)
    expected = (
        f"rank {victim} on {HOST} failed in {IN_LAYER}: ArithmeticError: the experts summed to 7"
    )
    assert re.match(expected, report), report
    assert job.codes()[victim] == 1 and "Traceback" in job.err(victim)
    assert resumed(folder, tmp_path) == undisturbed


@pytest.mark.parametrize("fault", ["skip", "hang"])
def test_a_rank_that_is_not_where_the_others_wait_is_named(
    folder, undisturbed, start, tmp_path, fault
):
    victim = 1 if fault == "skip" else 2
    job = start(fault, victim)
    report = one_report(job, victim)
    others = "ranks 0, 2" if victim == 1 else "ranks 0, 1"
    progress = PROGRESS if fault == "skip" else IN_LAYER
    expected = (
        rf"rank {victim} on {HOST} has been at {progress} for [\d.]+ s, while {others} wait at"
    )
    assert re.match(f"{expected} {PROGRESS}", report), report
    assert job.codes()[victim] == 1, "it exits too"
    assert resumed(folder, tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("where", "victim", "doing"),
    [
        ("loading", 1, "loading the model"),
        ("scanning", 0, "reading the input and the ledger"),
        ("merging", 0, "merging the output"),
    ],
)
@pytest.mark.long
def test_a_rank_that_hangs_outside_of_the_steps_is_named_with_what_it_was_doing(
    folder, undisturbed, start, tmp_path, where, victim, doing
):
    job = start(f"hang {where}", victim)
    report = one_report(job, victim)
    others = "ranks 0, 2 wait" if victim == 1 else "ranks 1, 2 wait"
    expected = rf"rank {victim} on {HOST} has been {doing} for [\d.]+ s, while {others}: it hangs"
    assert re.match(expected, report), report
    assert job.codes()[victim] == 1, "it exits too"
    assert finish(folder, tmp_path / "out.jsonl") == undisturbed


@pytest.mark.parametrize("settings", [(), OVER_GLOO], ids=["shared memory", "gloo"])
def test_a_rank_that_skips_an_all_to_all_is_named_by_the_collective_counts(
    folder, undisturbed, start, tmp_path, settings
):
    """Its next collective has sizes that do not fit those of the others, if one is matched."""
    job = start("mismatch", 1, *settings)
    report = one_report(job, 1)
    assert re.match(f"rank 1 on {HOST} has been at {PROGRESS} for ", report), report
    mine, theirs = map(int, re.findall(r"collective (\d+)", report))
    assert mine > theirs and "ranks 0, 2 wait at" in report, "it is ahead of the others"
    assert job.codes()[1] == 1
    assert resumed(folder, tmp_path) == undisturbed


def test_a_rank_of_another_expert_group_ends_the_run_too(start):
    job = start("kill", 3, "--set", "parallel.expert=2", world=4)
    report = one_report(job, 3)
    assert re.match(f"rank 3 on {HOST} has published no heartbeat", report), report


@pytest.mark.alone
@pytest.mark.parametrize(
    ("fault", "victim", "settings"),
    [
        ("kill", 1, ()),
        ("kill", 0, ()),
        ("kill", 1, OVER_GLOO),
        ("stop", 1, ()),
        ("stop", 0, ()),
        ("stop", 1, OVER_GLOO),
        ("raise", 1, ()),
        ("raise", 0, ()),
        ("skip", 1, ()),
        ("hang", 2, ()),
        ("mismatch", 1, ()),
        ("mismatch", 1, OVER_GLOO),
        ("hang loading", 1, ()),
        ("hang scanning", 0, ()),
        ("hang merging", 0, ()),
        ("kill", 3, ("--set", "parallel.expert=2")),
    ],
)
def test_all_ranks_exit_within_the_timeout_after_a_fault(start, fault, victim, settings):
    """A stopped rank, which cannot, exits soon after it is continued."""
    job = start(fault, victim, *settings, world=max(WORLD, victim + 1))
    began = job.faulted_at(victim)
    job.codes(except_rank=victim)
    taken = time.monotonic() - began
    assert taken < TIMEOUT_S, f"{taken:.1f} s"
    if fault == "stop":
        os.kill(job.processes[victim].pid, signal.SIGCONT)
        job.codes(within_s=TIMEOUT_S + MARGIN_S)


def under_torchrun(folder: Path, output: Path, fault: str, victim: int) -> str:
    """The launcher's stderr, with all ranks', when a rank breaks."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    argv += [fault_worker.__file__, fault, str(victim), str(LAYER_CALL)]
    argv += command(folder, output)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("fault", "rank", "quoted"),
    [
        pytest.param(
            "kill", "1", r"Signal 9 \(SIGKILL\) received by PID \d+", marks=pytest.mark.long
        ),
        pytest.param(
            "raise",
            "1",
            "Traceback .*ArithmeticError: the experts summed to 7 and a half",
            marks=pytest.mark.long,
        ),
        (
            "hang",
            r"\d",
            f"fault: rank 1 on {HOST} has been at {IN_LAYER} for .* while ranks 0, 2 wait",
        ),
    ],
    ids=["a killed rank", "a rank that raises", "a rank that hangs"],
)
def test_torchruns_summary_names_the_rank_at_fault_and_quotes_why(
    folder, tmp_path, fault, rank, quoted
):
    stderr = under_torchrun(folder, tmp_path / "out.jsonl", fault, 1)
    root = stderr.partition("Root Cause (first observed failure):")[2]
    assert re.search(rf"rank      : {rank} \(", root), stderr
    assert re.search(f"traceback : {quoted}", root, re.DOTALL), stderr


@pytest.mark.long
def test_under_torchrun_the_report_is_printed_though_the_agent_ends_the_survivors(
    folder, undisturbed, tmp_path
):
    stderr = under_torchrun(folder, tmp_path / "out.jsonl", "kill", 1)
    reports = re.findall(r"^fault: (.*)$", stderr, re.MULTILINE)
    assert len(reports) == 1 and reports[0].startswith("rank 1 on "), stderr
    assert re.search(f"last seen in {IN_LAYER}", reports[0])
    assert resumed(folder, tmp_path) == undisturbed
