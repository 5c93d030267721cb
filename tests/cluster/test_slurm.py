"""The Slurm scripts under a real slurmctld and slurmds: run, cancelled, out of time, a node lost.

python -m pytest tests/cluster/test_slurm.py

Needs Debian's packages slurm-wlm and munge, and skips without. Every job runs the tiny model on the
CPU over the same requests and must write the file that one undisturbed process writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.parts import written
from virtual_slurm import VirtualSlurm, missing_programs

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
NUM_REQUESTS = 200
JOB_S = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no {', '.join(missing_programs())} here: apt-get install slurm-wlm munge",
    ),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[VirtualSlurm]:
    with VirtualSlurm(num_nodes=3) as slurm:
        yield slurm
        slurm.run("scancel", "--user", str(os.getuid()))
    assert slurm.processes() == []


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    with path.open("w") as file:
        for number in range(NUM_REQUESTS):
            prompt = f"Request {number}: the capital of France is"
            line = {"id": f"r{number}", "prompt": prompt, "max_new_tokens": 4 + number % 30}
            file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(requests: Path) -> bytes:
    """The output of one process, without a launcher and without faults."""
    output = requests.with_name("undisturbed.jsonl")
    script = ROOT / "launch" / "infer.py"
    argv = [sys.executable, str(script), *arguments(requests, output, ranks=1)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=JOB_S)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in output.open()] == [
        f"r{number}" for number in range(NUM_REQUESTS)
    ]
    return output.read_bytes()


def arguments(requests: Path, output: Path, ranks: int, *more: str) -> list[str]:
    """Return the script's arguments; a job on two ranks is slow enough to be interrupted."""
    settings = {
        "parallel.expert": ranks,
        "scheduler.max_sequences": 8 if ranks == 2 else 64,
        "sampling.ignore_eos": True,
        "runtime.device": "cpu",
        "runtime.timeout_s": 10,
    }
    overrides = [word for name in settings for word in ("--set", f"{name}={settings[name]}")]
    files = ["--input", str(requests), "--output", str(output)]
    return ["--config", "tiny_mixtral_ep2", *overrides, *files, *more]


def submit(
    slurm: VirtualSlurm, script: str, options: list[str], argv: list[str], log: Path, **environ: str
) -> str:
    """Submit from a directory that is not the project's; return the job's id."""
    options = [f"--chdir={log.parent}", f"--output={log}", *options]
    settings = {"LOCKSTEP": str(ROOT), "PYTHON": sys.executable}
    return slurm.sbatch(*options, str(SCRIPTS / script), *argv, environ=settings | environ)


def resumed(output: Path) -> int:
    """Return how many requests the last run found completed."""
    return json.loads(output.with_name(output.name + ".report.json").read_text())["resumed"]


def test_one_torchrun_per_node_and_one_rank_per_gpu_give_the_output_of_one_process(
    slurm, requests, undisturbed, tmp_path
):
    output, log, inside = tmp_path / "out.jsonl", tmp_path / "log", tmp_path / "inside"
    container = tmp_path / "container"  # called as `container exec image COMMAND...`
    container.write_text(f'#!/bin/sh\nshift 2\necho "$*" >>{inside}\nexec "$@"\n')
    container.chmod(0o755)
    argv = arguments(requests, output, ranks=4)
    options = ["--nodes=2", "--gpus-per-node=2"]
    job = submit(slurm, "infer.sbatch", options, argv, log, CONTAINER=f"{container} exec image")
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the job's end")
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert output.read_bytes() == undisturbed
    # No node's name resolves here.
    assert "2 nodes x 2 ranks, rendezvous at 127.0.0.1:" in log.read_text()
    assert inside.read_text().count("launch/slurm/node.py --nnodes=2 --nproc-per-node=2") == 2


def test_one_task_per_rank_gives_the_output_of_one_process(slurm, requests, undisturbed, tmp_path):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    argv = arguments(requests, output, ranks=4)
    job = submit(slurm, "infer_srun.sbatch", ["--nodes=2", "--ntasks-per-node=2"], argv, log)
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the job's end")
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert output.read_bytes() == undisturbed


def test_without_the_script_a_task_finds_the_head_through_scontrol(slurm):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); "
        "from engine.distributed.discovery import discover; "
        "launch = discover(os.environ); print(launch.rank, launch.addr, launch.port)"
    )
    step = ["srun", "--nodes=2", "--ntasks-per-node=2", "--exclusive"]
    shown = slurm.run(*step, sys.executable, "-c", code, str(ROOT)).split()
    assert sorted(shown[0::3]) == ["0", "1", "2", "3"]
    assert shown[1::3] == ["127.0.0.1"] * 4
    assert len(set(shown[2::3])) == 1, "all ranks use one port"


def test_tasks_of_srun_count_their_node_and_a_process_under_salloc_counts_itself(slurm):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); "
        "from engine.config.host_devices import launcher_of, local_rank_of; "
        "own = local_rank_of(os.environ); "
        "print(launcher_of(os.environ), own.index, own.num_ranks, "
        "os.environ['SLURM_NTASKS_PER_NODE'])"
    )
    process = [sys.executable, "-c", code, str(ROOT)]
    nodes = ["--nodes=2", "--ntasks-per-node=2", "--exclusive"]
    tasks = slurm.run("srun", *nodes, *process).splitlines()
    assert sorted(tasks) == ["slurm 0 2 2", "slurm 0 2 2", "slurm 1 2 2", "slurm 1 2 2"]
    alone = slurm.run("salloc", *nodes, *process).splitlines()
    assert alone == ["single 0 1 2"]
    within = slurm.run("salloc", *nodes, "srun", "--ntasks=1", "--nodes=1", *process).splitlines()
    assert within == ["slurm 0 1 2"]


def test_a_cancelled_job_stays_cancelled_and_the_same_command_finishes_it(
    slurm, requests, undisturbed, tmp_path
):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    command = "infer_srun.sbatch", ["--nodes=2"], arguments(requests, output, ranks=2), log
    job = submit(slurm, *command)
    slurm.wait(lambda: written(output) > 0, JOB_S, "the first record")
    slurm.run("scancel", job)
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the cancelled job's end")
    assert (slurm.state(job), slurm.job(job)["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    assert not output.exists()
    job = submit(slurm, *command)
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the job's end")
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert output.read_bytes() == undisturbed and resumed(output) > 0


def test_a_job_that_runs_out_of_time_requeues_itself_and_resumes(
    slurm, requests, undisturbed, tmp_path
):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    job = submit(slurm, "infer.sbatch", ["--nodes=2"], arguments(requests, output, ranks=2), log)
    slurm.wait(lambda: written(output) > 0, JOB_S, "the first record")
    slurm.run("scancel", "--batch", "--signal=TERM", job)  # as --signal=B:TERM@120 does
    slurm.restart_now(job)
    assert not output.exists(), "there was something left to do"
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the job's end")
    assert (slurm.state(job), slurm.job(job)["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert "requeued, restart 1" in log.read_text()
    assert output.read_bytes() == undisturbed and resumed(output) > 0


def test_a_preempted_job_is_requeued_once_and_resumes(slurm, requests, undisturbed, tmp_path):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    job = submit(
        slurm, "infer_srun.sbatch", ["--nodes=2"], arguments(requests, output, ranks=2), log
    )
    slurm.wait(lambda: written(output) > 0, JOB_S, "the first record")
    urgent = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    slurm.sbatch(*urgent, "--wrap=true")
    slurm.restart_now(job)
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the job's end")
    assert (slurm.state(job), slurm.job(job)["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert output.read_bytes() == undisturbed and resumed(output) > 0


def test_a_job_that_loses_its_head_node_resumes_without_it(slurm, requests, undisturbed, tmp_path):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    job = submit(
        slurm, "infer_srun.sbatch", ["--nodes=2"], arguments(requests, output, ranks=2), log
    )
    slurm.wait(lambda: written(output) > 0, JOB_S, "the first record")
    assert slurm.job(job)["NodeList"] == "n[1-2]"  # n1 runs the script and rank 0
    for state in ("down", "drain"):  # drain: up again, it would take the job
        slurm.run("scontrol", "update", "NodeName=n1", f"State={state}", "Reason=test")
    slurm.restart_now(job)
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the job's end")
    assert (slurm.state(job), slurm.job(job)["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert slurm.job(job)["NodeList"] == "n[2-3]"
    assert output.read_bytes() == undisturbed and resumed(output) > 0
    slurm.run("scontrol", "update", "NodeName=n1", "State=undrain")


def test_a_wrong_setting_fails_the_job_with_its_message_and_is_not_tried_again(
    slurm, requests, tmp_path
):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    argv = arguments(requests, output, 2, "--set", "scheduler.max_sequencs=4")
    job = submit(slurm, "infer.sbatch", ["--nodes=2"], argv, log, MAX_ERROR_REQUEUES="3")
    slurm.wait(lambda: slurm.ended(job), JOB_S, "the job's end")
    ended = slurm.job(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "scheduler.max_sequencs = 4: unknown key; did you mean" in log.read_text()
    assert not output.exists()


def test_a_job_whose_every_line_failed_is_not_tried_again(slurm, tmp_path):
    output, log, bad = tmp_path / "out.jsonl", tmp_path / "log", tmp_path / "in.jsonl"
    bad.write_text('{"id": 1, "prompt": ""}\n{"id": 2, "prompt": 7}\n')
    argv = arguments(bad, output, 2)
    for script in ("infer.sbatch", "infer_srun.sbatch"):
        job = submit(slurm, script, ["--nodes=2"], argv, log, MAX_ERROR_REQUEUES="3")
        slurm.wait(lambda job=job: slurm.ended(job), JOB_S, "the job's end")
        ended = slurm.job(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0")
    assert "error: every line failed: 2 of 2 records are errors" in log.read_text()
    assert len(output.read_text().splitlines()) == 2


def test_a_requeued_retry_is_continued_and_not_begun_once_more(slurm, tmp_path):
    output, log, lines = tmp_path / "out.jsonl", tmp_path / "log", tmp_path / "in.jsonl"
    lines.write_text('{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": 7}\n')
    argv = arguments(lines, output, 1)
    first = submit(slurm, "infer.sbatch", [], argv, log)
    slurm.wait(lambda: slurm.ended(first), JOB_S, "the job's end")
    assert "2 requests, 1 with an error record." in log.read_text()
    for script in ("infer.sbatch", "infer_srun.sbatch"):
        job = submit(slurm, script, [], [*argv, "--retry-errors"], log)
        slurm.wait(lambda job=job: slurm.ended(job), JOB_S, "the job's end")
        made = json.loads(output.with_name("out.jsonl.job.json").read_text())
        assert log.read_text().count("1 run again after an error") == len(made["retries"])
        slurm.run("scontrol", "requeue", job)  # as after a node that was lost in its last second
        slurm.wait(lambda job=job: slurm.job(job)["Restarts"] == "1", JOB_S, "the restart")
        slurm.restart_now(job)
        slurm.wait(lambda job=job: slurm.ended(job), JOB_S, "the job's end")
        assert slurm.state(job) == "COMPLETED", log.read_text()
        assert "after this request's retry, 1 of its 2 records are errors" in log.read_text()
        assert made == json.loads(output.with_name("out.jsonl.job.json").read_text())
    assert [each["round"] for each in made["retries"]] == [1, 2]


def test_an_array_merges_its_slices_once_though_one_of_them_was_requeued(
    slurm, requests, undisturbed, tmp_path
):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    argv = arguments(requests, output, 1, "--set", "scheduler.max_sequences=4")
    options = ["--array=0-2", f"--output={log}-%a"]
    array = submit(slurm, "array.sbatch", options, argv, log)
    # The last task, whose own job id is the whole array's.
    last = f"{array}_2"
    slice_output = tmp_path / "out.jsonl.slice-00002-of-00003"
    slurm.wait(lambda: written(slice_output) > 0, JOB_S, "a record")
    slurm.run("scancel", "--batch", "--signal=TERM", last)
    slurm.restart_now(last)
    slurm.wait(lambda: slurm.ended(array), JOB_S, "the array's end")
    jobs = [slurm.job(f"{array}_{index}") for index in range(3)]
    logs = "".join(Path(f"{log}-{index}").read_text() for index in range(3))
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * 3, logs
    assert [job["Restarts"] for job in jobs] == ["0", "0", "1"], "only the one that was signalled"
    assert output.read_bytes() == undisturbed
    assert list(tmp_path.glob("*slice*")) == []
