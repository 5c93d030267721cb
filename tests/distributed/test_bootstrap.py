"""Ranks that join, and ranks that must not run together: real processes over gloo.

python -m pytest tests/distributed/test_bootstrap.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.errors import RankError, RendezvousError, UnreportedError, raise_on_any_rank
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def make_config(expert: int | None = None, tensor: int = 1, **runtime) -> Config:
    return Config(
        model=ModelConfig(path="unused"),
        parallel=ParallelConfig(expert=expert, tensor=tensor),
        runtime=RuntimeConfig(**{"timeout_s": 30.0, "device": "cpu"} | runtime),
    )


def error_of(rank: int, config: Config, problem: str | None = None) -> str:
    try:
        with bootstrap.broadcast_startup_error():
            if problem is not None:
                raise ValueError(problem)
        bootstrap.start(config)
    except (RankError, RendezvousError, UnreportedError) as error:
        return str(error)
    return ""


def sums_of_all_groups(rank: int) -> tuple:
    topology = bootstrap.start(make_config(expert=2, tensor=2))
    sums = []
    for group in (topology.world, topology.expert, topology.tensor, topology.control):
        value = torch.tensor([10.0**rank])
        dist.all_reduce(value, group=group.handle)
        sums.append(int(value))
        assert group.ranks[group.rank] == rank
    ticket = topology.store.add("ticket", 1)
    bootstrap.stop(topology)
    bootstrap.stop(topology)  # safe to call twice
    assert not dist.is_initialized()
    return (*sums, topology.data_rank, topology.replica, ticket)


def test_every_group_reduces_over_its_own_ranks_and_tickets_are_unique():
    results = run_ranks(sums_of_all_groups, 4)
    assert [result[:-1] for result in results] == [
        (1111, 11, 11, 11, 0, 0),
        (1111, 11, 11, 11, 0, 0),
        (1111, 1100, 1100, 1100, 1, 1),
        (1111, 1100, 1100, 1100, 1, 1),
    ]
    assert sorted(result[-1] for result in results) == [1, 2, 3, 4]


def sums_where_all_ranks_create_groups(rank: int) -> tuple:
    """As `sums_of_all_groups`, with a torch that refuses groups created by their members alone."""
    new_group = dist.new_group

    def of_all_ranks(ranks, use_local_synchronization=False, **options):
        if use_local_synchronization:
            raise NotImplementedError("new_group cannot ... with use_local_synchronization=True")
        return new_group(ranks, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", of_all_ranks)
        return sums_of_all_groups(rank)


def test_a_torch_that_wants_all_ranks_to_create_every_group_gets_the_same_groups():
    assert [result[:-1] for result in run_ranks(sums_where_all_ranks_create_groups, 4)] == [
        (1111, 11, 11, 11, 0, 0),
        (1111, 11, 11, 11, 0, 0),
        (1111, 1100, 1100, 1100, 1, 1),
        (1111, 1100, 1100, 1100, 1, 1),
    ]


def start_twice(rank: int) -> list[int]:
    sums = []
    for step in (1, 10):
        topology = bootstrap.start(make_config())
        value = torch.tensor([step])
        dist.all_reduce(value, group=topology.expert.handle)
        sums.append(int(value))
        bootstrap.stop(topology)
    return sums


def test_a_process_can_run_twice_over_a_store_with_old_keys():
    assert run_ranks(start_twice, 2) == [[2, 20], [2, 20]]


def test_an_expert_size_that_does_not_divide_the_world_is_one_error_on_all_ranks():
    errors = run_ranks(error_of, 4, make_config(expert=3))
    assert len(set(errors)) == 1
    assert "parallel.expert = 3" in errors[0] and "4" in errors[0]


def error_of_different(rank: int) -> str:
    return error_of(rank, make_config(seed=1 if rank == 2 else 0))


def test_ranks_with_different_configs_are_refused_and_grouped_by_digest():
    errors = run_ranks(error_of_different, 4)
    assert len(set(errors)) == 1
    assert "different configs" in errors[0]
    assert "ranks 0, 1, 3 (" in errors[0] and "; rank 2 (" in errors[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_gpu_is_one_error_on_all_ranks():
    errors = run_ranks(error_of, 2, make_config(device="cuda"))
    assert len(set(errors)) == 1
    assert "runtime.device = 'cuda'" in errors[0] and "ranks 0, 1 on" in errors[0]


def error_on_gpus(rank: int, gpus_of_ranks: list[list[str]]) -> str:
    """Join with these GPUs visible, which torch is made to see."""
    gpus = [SimpleNamespace(uuid=uuid) for uuid in gpus_of_ranks[rank]]
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    patch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)

    def choose(device: torch.device) -> None:
        raise ValueError(f"{device} {gpus[device.index].uuid}")  # there is none to go on with

    patch.setattr(torch.cuda, "set_device", choose)
    try:
        return error_of(rank, make_config(device="cuda"))
    except ValueError as error:
        return str(error)


def test_real_ranks_on_one_gpu_are_refused_with_one_text():
    errors = run_ranks(error_on_gpus, 2, [["GPU-a"], ["GPU-a"]])
    assert len(set(errors)) == 1
    assert f"ranks 0, 1 on {socket.gethostname()}: share one GPU, GPU-a" in errors[0]


def test_real_ranks_take_the_gpus_that_they_see_alone():
    assert run_ranks(error_on_gpus, 2, [["GPU-a"], ["GPU-b"]]) == ["cuda:0 GPU-a", "cuda:0 GPU-b"]
    both = ["GPU-a", "GPU-b"]
    assert run_ranks(error_on_gpus, 2, [both, both]) == ["cuda:0 GPU-a", "cuda:1 GPU-b"]
    own = [["GPU-a", "GPU-b"], ["GPU-c"], ["GPU-d", "GPU-e"]]
    assert run_ranks(error_on_gpus, 3, own) == ["cuda:0 GPU-a", "cuda:0 GPU-c", "cuda:0 GPU-d"]


def error_of_one_host(rank: int) -> str:
    return error_of(rank, make_config(), "model.path = 'x': no such directory" if rank else None)


def test_a_problem_of_one_rank_before_the_rendezvous_is_raised_by_all_with_its_host():
    errors = run_ranks(error_of_one_host, 2)
    expected = f"rank 1 on {socket.gethostname()}: model.path = 'x': no such directory"
    assert errors == [expected] * 2


def test_a_problem_that_all_ranks_have_is_raised_without_their_names():
    assert run_ranks(error_of, 2, make_config(), "no such file") == ["no such file"] * 2


def absent_with_problem(rank: int) -> str:
    pytest.MonkeyPatch().setattr(bootstrap, "RENDEZVOUS_TIMEOUT_S", 2.0)
    return error_of(rank, make_config(), "no such disk") if rank == 0 else "absent"


def test_a_rank_with_a_problem_raises_it_even_when_another_never_joins():
    error, _ = run_ranks(absent_with_problem, 2)
    assert error.startswith("no such disk\n") and "rank 1 of 2 did not join" in error


def absent(rank: int) -> str:
    return error_of(rank, make_config(timeout_s=2.0)) if rank != 1 else "absent"


def test_a_rank_that_never_joins_is_named():
    errors = run_ranks(absent, 3)
    assert "rank 1 of 3 did not join within 2 s" in errors[0]
    assert errors[2] == errors[0]


def share(rank: int) -> str:
    topology = bootstrap.start(make_config())
    raise_on_any_rank(topology.control, None)
    try:
        raise_on_any_rank(topology.control, f"disk {rank} is full" if rank else None)
    except RankError as error:
        bootstrap.stop(topology)
        return str(error)
    return ""


def test_an_error_of_some_ranks_is_raised_by_all_with_one_text():
    assert run_ranks(share, 3) == ["rank 1: disk 1 is full\nrank 2: disk 2 is full"] * 3


def threads(rank: int, omp: str, config: Config) -> int:
    os.environ["OMP_NUM_THREADS"] = omp
    topology = bootstrap.start(config)
    raise_on_any_rank(topology.control, None)  # no rank exits while another connects
    return torch.get_num_threads()


def test_torchruns_own_omp_setting_is_ignored_and_any_other_is_kept():
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert run_ranks(threads, 2, "1", make_config()) == [share, share]
    assert run_ranks(threads, 2, "3", make_config()) == [3, 3]
    assert run_ranks(threads, 2, "3", make_config(threads=5)) == [5, 5]


# --- Real launchers -------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
from engine.config import Config, ModelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.errors import raise_on_any_rank
config = Config(model=ModelConfig(path="unused"), runtime=RuntimeConfig(timeout_s=30.0))
try:
    topology = bootstrap.start(config)
    raise_on_any_rank(topology.control, None)
    source = bootstrap.discover(os.environ).source
    world = topology.world
    sys.stdout.write(f"{source} {world.rank} of {world.size} pid {os.getpid()}\\n")
    sys.stdout.flush()
    if sys.argv[1:] == ["wait"]:
        time.sleep(60)
    problem = sys.argv[1] if sys.argv[1:] and topology.world.rank else None
    raise_on_any_rank(topology.control, problem)
except ValueError as error:
    sys.exit(f"error: {error}")
"""


def launch(tmp_path: Path, command: list[str], *args: str, **environ: str) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "MASTER_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return subprocess.Popen(
        [*command, str(script), *args],
        env=clean | {"PYTHONPATH": str(ROOT)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_a_process_without_a_launcher_is_a_world_of_one(tmp_path):
    code, out, err = finish(launch(tmp_path, [sys.executable]))
    assert code == 0, err
    assert out.startswith("single 0 of 1")


def test_torchrun_starts_two_ranks_and_an_error_of_one_fails_the_job(tmp_path):
    code, out, err = finish(launch(tmp_path, TORCHRUN, "no more room"))
    assert "torchrun 0 of 2" in out and "torchrun 1 of 2" in out
    assert code != 0 and "error: rank 1: no more room" in err


@pytest.mark.long
def test_a_wrong_setting_is_reported_though_rank_0_starts_last(tmp_path):
    """torchrun ends all ranks when the first has exited, and only rank 0 reports."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0': time.sleep(5)\n"
    )
    infer = [*TORCHRUN, str(ROOT / "launch" / "infer.py"), "--config", "tiny_mixtral_ep2"]
    command = [*infer, "--set", "moe.capacity.factr=2"]
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    reported = re.findall(r"^error: moe.capacity.factr = 2: unknown key", done.stderr, re.MULTILINE)
    assert len(reported) == 1, done.stderr


def root_cause(stderr: str) -> str:
    """What torchrun's summary quotes of the failure that it takes for the first."""
    return stderr.partition("Root Cause (first observed failure):")[2]


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["--set", "moe.capacity.factr=2"], "error: moe.capacity.factr = 2: unknown key"),
        pytest.param(["--bogus"], "error: unrecognized arguments: --bogus", marks=pytest.mark.long),
        (
            ["--input", "in.jsonl", "--output", "/no/such.out"],
            "error: --output /no/such.out: the directory /no does not exist",
        ),
    ],
    ids=["setting", "command", "input"],
)
def test_torchruns_summary_quotes_what_the_user_got_wrong(arguments, quoted):
    infer = [*TORCHRUN, str(ROOT / "launch" / "infer.py"), "--config", "tiny_mixtral_ep2"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*infer, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    assert f"traceback : {quoted}" in root_cause(done.stderr), done.stderr
    assert "exitcode  : 2" in root_cause(done.stderr), done.stderr


def infer(rank: int, port: int, *arguments: str) -> subprocess.Popen:
    """Start launch/infer.py as one rank of two, each on a host of its own."""
    launch = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "infer.py"), *arguments],
        env=os.environ | launch,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_checkpoint_that_only_another_host_lacks_is_reported_by_rank_0():
    port, tiny = free_port(), ["--config", "tiny_mixtral_ep2"]
    here = infer(0, port, *tiny)
    there = infer(1, port, *tiny, "--set", "model.path=/no/such")
    code, _, err = finish(here)
    assert code == 2 and f"error: rank 1 on {socket.gethostname()}: this config cannot run" in err
    assert "model.path = '/no/such': no such directory" in err and "Traceback" not in err
    code, _, err = finish(there)
    assert code == 2 and "error:" not in err, "rank 0 has reported"


def test_a_config_that_only_another_host_lacks_is_reported_by_rank_0():
    port = free_port()
    here = infer(0, port, "--config", "tiny_mixtral_ep2")
    there = infer(1, port, "--config", "/no/such.yaml")
    code, _, err = finish(here)
    expected = f"error: rank 1 on {socket.gethostname()}: --config /no/such.yaml: no such file"
    assert code == 2 and err.startswith(expected)
    assert finish(there)[0] == 2


def run_alone(rank: int, local_rank: int) -> tuple[int, str]:
    """Run launch/infer.py as rank 1 of two, of which the other never joins."""
    from launch import infer as script

    if rank == 0:
        return 0, ""
    pytest.MonkeyPatch().setattr(bootstrap, "RENDEZVOUS_TIMEOUT_S", 1.0)
    os.environ["LOCAL_RANK"] = str(local_rank)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = script.main(["--config", "/no/such.yaml"])
    return code, err.getvalue()


def test_an_error_that_the_others_cannot_receive_is_reported_once_per_host():
    code, err = run_ranks(run_alone, 2, 0)[1]
    assert code == 2
    assert err.startswith(f"rank 1 on {socket.gethostname()}: error: --config /no/such.yaml")
    assert "rank 0 of 2 did not join within 1 s" in err
    assert run_ranks(run_alone, 2, 1)[1] == (2, "")


def test_workers_die_with_a_killed_torchrun_agent(tmp_path):
    process = launch(tmp_path, TORCHRUN, "wait")
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_slurm_tasks_join_at_the_steps_own_port(tmp_path):
    step = {
        "SLURM_JOB_ID": str(free_port()),  # the port is derived from it
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    tasks = [
        launch(tmp_path, [sys.executable], SLURM_PROCID=rank, SLURM_LOCALID=rank, **step)
        for rank in "01"
    ]
    for rank, (code, out, err) in enumerate([finish(task) for task in tasks]):
        assert code == 0, err
        assert out.startswith(f"slurm {rank} of 2")


def test_a_process_inside_an_allocation_is_a_world_of_one(tmp_path):
    allocation = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_TASKS_PER_NODE": "8(x2)",
        "SLURM_PROCID": "0",
        "SLURM_STEP_ID": "4294967290",  # of the shell that salloc can start as a step
    }
    code, out, err = finish(launch(tmp_path, [sys.executable], **allocation))
    assert code == 0, err
    assert out.startswith("single 0 of 1")
