"""DeepSpeed's launcher starts launch/infer.py unchanged: on one host; by pdsh and mpirun on two.

python -m pytest tests/cluster/test_deepspeed.py

The hosts are network namespaces with real sshds. Needs root and Debian's packages pdsh,
openssh-server, openssh-client, openmpi-bin and iproute2; skips, by name, what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.job import Job, read_lines

from tests.helpers.namespaces import VirtualHosts, why_no_hosts

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))
NUM_REQUESTS = 24
TIMEOUT_S = 30.0
RUN_S = 120.0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("deepspeed"), NUM_REQUESTS, TIMEOUT_S)


@pytest.fixture(scope="module")
def hosts() -> Iterator[VirtualHosts]:
    if why := why_no_hosts(pdsh="pdsh", mpirun_openmpi="openmpi-bin"):
        pytest.skip(f"no hosts to test on: {why}")
    with VirtualHosts(2) as hosts:
        (hosts.dir / "hostfile").write_text("".join(f"{name} slots=2\n" for name in hosts.names))
        yield hosts


@pytest.fixture
def environ() -> dict[str, str]:
    """The user's environment; the second half is for Open MPI, run as root on two cores."""
    return {
        "DS_ACCELERATOR": "cpu",  # required by DeepSpeed where there is no GPU
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def report(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".report.json").read_text())["run"]


def hosts_of_ranks(output: Path) -> list[str]:
    return [rank["host"] for rank in report(output)["ranks"]]


def test_on_one_host_the_records_are_those_of_one_process(job, undisturbed, tmp_path, environ):
    output = tmp_path / "out.jsonl"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [LAUNCHER, "--num_gpus", "2", *job.command(output)],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stderr
    assert read_lines(output) == undisturbed and len(hosts_of_ranks(output)) == 2


@pytest.mark.parametrize("runner", ["pdsh", "openmpi"])
def test_over_two_hosts_the_records_are_those_of_one_process(
    hosts, job, undisturbed, tmp_path, environ, runner
):
    output, hostfile = tmp_path / "out.jsonl", hosts.dir / "hostfile"
    options = ["--hostfile", str(hostfile), "--launcher", runner]
    if runner == "pdsh":  # its mpirun runner takes the number of ranks from the hostfile alone
        options += ["--num_gpus", "2"]
    logged = ["--set", "profiler.deepspeed_comms=true"]
    done = hosts.run(
        hosts.names[0],
        [LAUNCHER, *options, *job.command(output), *logged],
        environ=environ,
        timeout_s=RUN_S,
    )
    assert done.code == 0, done.output
    assert read_lines(output) == undisturbed
    assert hosts_of_ranks(output) == ["host1", "host1", "host2", "host2"]
    for rank in report(output)["ranks"]:
        assert {"all_to_all_single (dispatch)", "all_gather (consensus)"} <= rank["comms"].keys()
    assert "waiting for stragglers and overlapped work included" in done.output


def test_a_wrong_setting_fails_the_launch_and_is_reported_once(job, tmp_path, environ):
    command = [LAUNCHER, "--num_gpus", "2", *job.command(tmp_path / "out.jsonl")]
    done = subprocess.run(
        [*command, "--set", "moe.capacity.factr=2"],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode != 0
    assert done.stderr.count("moe.capacity.factr = 2: unknown key; did you mean") == 1, done.stderr
