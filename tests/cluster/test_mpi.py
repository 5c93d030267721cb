"""mpirun starts the ranks and mpi4py provides their rendezvous, under Open MPI and MPICH.

python -m pytest tests/cluster/test_mpi.py

Needs Debian's packages openmpi-bin and mpich, which share a machine: each mpirun must get the
library of its own family. Skips, by name, what is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from chaos.job import Job, read_lines

from tests.helpers.namespaces import VirtualHosts, which, why_no_hosts

ROOT = Path(__file__).resolve().parents[2]
NUM_REQUESTS = 24
TIMEOUT_S = 20.0
RUN_S = 90.0
# To run as root in a container, and more ranks than cores; MPICH asks for neither.
ALLOW = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
PROGRAMS = {"openmpi": "mpirun.openmpi", "mpich": "mpiexec.mpich"}
PACKAGES = {"openmpi": "openmpi-bin", "mpich": "mpich"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("mpi"), NUM_REQUESTS, TIMEOUT_S)


def mpirun(family: str) -> str:
    if not (path := shutil.which(PROGRAMS[family])):
        pytest.skip(f"{PROGRAMS[family]} is not installed: apt-get install {PACKAGES[family]}")
    return path


def environment(family: str, folder: Path) -> dict[str, str]:
    """Return a user's environment; folder: for the link that Debian's MPICH lacks."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MPI4PY_LIBMPI")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    if family == "mpich" and (library := library_of_debian()):
        (folder / "libmpi.so.12").symlink_to(library)
        environ["LD_LIBRARY_PATH"] = str(folder)
    return environ | ALLOW | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def hosts_of_ranks(output: Path) -> list[str]:
    """Return the host of each rank, from the run's report."""
    report = json.loads(output.with_name(output.name + ".report.json").read_text())
    return [rank["host"] for rank in report["run"]["ranks"]]


def library_of_debian() -> Path | None:
    found = sorted(Path("/usr/lib").glob("*/libmpich.so.12"))
    return found[0] if found else None


def launch(command: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=RUN_S)


@pytest.mark.parametrize("family", PROGRAMS)
def test_a_job_under_mpirun_writes_the_records_of_one_process(family, job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    command = [mpirun(family), "-n", "2", sys.executable, *job.command(output)]
    done = launch(command, environment(family, tmp_path))
    assert done.returncode == 0, done.stderr
    assert read_lines(output) == undisturbed
    assert len(hosts_of_ranks(output)) == 2


@pytest.mark.parametrize("family", PROGRAMS)
def test_the_script_for_mpi_starts_the_ranks_it_is_asked_for(family, job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    environ = environment(family, tmp_path) | {
        "RANKS": "2",
        "MPIRUN": mpirun(family),
        "PYTHON": sys.executable,
    }
    done = launch(["bash", str(ROOT / "launch/mpi/infer.sh"), *job.command(output)[1:]], environ)
    assert done.returncode == 0, done.stderr
    assert read_lines(output) == undisturbed and len(hosts_of_ranks(output)) == 2


@pytest.mark.parametrize("family", PROGRAMS)
def test_a_wrong_setting_ends_mpirun_with_its_message_printed_once(family, job, tmp_path):
    arguments = [*job.command(tmp_path / "out.jsonl"), "--set", "moe.capacity.factr=2"]
    command = [mpirun(family), "-n", "2", sys.executable, *arguments]
    done = launch(command, environment(family, tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("moe.capacity.factr = 2: unknown key; did you mean") == 1, done.stderr


def test_mpich_without_its_library_is_an_error_that_names_the_remedy(job, tmp_path):
    program = mpirun("mpich")
    environ = environment("openmpi", tmp_path) | {"LD_LIBRARY_PATH": str(tmp_path)}
    own = Path(sys.prefix) / "lib" / "libmpi.so.12"
    if own.exists():
        pytest.skip(f"{own} is there, from the package mpich of PyPI")
    done = launch([program, "-n", "1", sys.executable, *job.command(tmp_path / "o")], environ)
    assert done.returncode != 0
    assert "error: started by MPICH's mpirun, but mpi4py cannot be used" in done.stderr
    assert "make a link of that name to it" in done.stderr


@pytest.fixture(scope="module")
def hosts() -> Iterator[VirtualHosts]:
    if why := why_no_hosts(**{"mpirun_openmpi": "openmpi-bin"}):
        pytest.skip(f"no hosts to test on: {why}")
    with VirtualHosts(2) as hosts:
        yield hosts


def test_mpirun_over_two_hosts_writes_the_records_of_one_process(hosts, job, undisturbed, tmp_path):
    output, hostfile = tmp_path / "out.jsonl", tmp_path / "hosts"
    hostfile.write_text("".join(f"{name} slots=2\n" for name in hosts.names))
    command = [str(which("mpirun.openmpi")), "-n", "4", "--hostfile", str(hostfile)]
    command += ["--mca", "btl_tcp_if_include", "eth0", "-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"]
    done = hosts.run(
        hosts.names[0],
        [*command, sys.executable, *job.command(output)],
        environ=environment("openmpi", tmp_path),
        timeout_s=RUN_S,
    )
    assert done.code == 0, done.output
    assert read_lines(output) == undisturbed and hosts_of_ranks(output) == [
        "host1",
        "host1",
        "host2",
        "host2",
    ]
