"""Launch discovery and the decisions of the rendezvous, as pure functions of their input.

python -m pytest tests/unit/distributed/test_bootstrap.py
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.config.host_devices import LocalRank, find_gpus
from engine.distributed import bootstrap
from engine.distributed.bootstrap import Launch, discover
from engine.distributed.discovery import choose_library, expand_tasks_per_node, first_node
from engine.distributed.errors import RankError, merge_errors
from engine.distributed.rendezvous import (
    RankInfo,
    assign_gpus,
    choose_device,
    share_of_cores,
)

LAUNCH = Path(__file__).parents[3] / "launch"

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
# What a task of `srun -N2 -n4` that was placed 3 + 1 sees; the allocation is larger than the step.
SRUN = {
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "localhost,other",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_TASKS_PER_NODE": "8(x2)",
}
# What a script under `sbatch -N2 -n4` sees outside srun: numbers, but no step.
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_torchrun_environment_is_used_unchanged():
    assert discover(TORCHRUN) == Launch(5, 8, 1, 4, "head", 29500, "torchrun")


def test_deepspeeds_launcher_counts_the_ranks_of_a_host_by_another_name():
    environ = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    environ["LOCAL_SIZE"] = "4"
    assert discover(environ) == Launch(5, 8, 1, 4, "head", 29500, "deepspeed")
    with pytest.raises(ValueError, match="LOCAL_SIZE='none'"):
        discover(environ | {"LOCAL_SIZE": "none"})


@pytest.mark.parametrize(
    "given", [{"MPI4PY_LIBMPI": "/site/libmpi.so"}, {"MPI4PY_MPIABI": "mpich"}]
)
def test_a_users_choice_of_mpi_library_is_kept(monkeypatch, given):
    for name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    choose_library("openmpi")
    assert {n: v for n, v in os.environ.items() if n.startswith("MPI4PY")} == given


@pytest.mark.parametrize("family, name", [("openmpi", "libmpi.so.40"), ("mpich", "libmpi.so.12")])
def test_mpi4py_gets_the_library_of_the_mpirun_that_started_it(monkeypatch, family, name):
    monkeypatch.delenv("MPI4PY_MPIABI", raising=False)
    monkeypatch.setenv("MPI4PY_LIBMPI", "")  # so that it is put back
    monkeypatch.delenv("MPI4PY_LIBMPI")
    choose_library(family)
    own, installed, other = os.environ["MPI4PY_LIBMPI"].split(os.pathsep)
    assert own.endswith(f"/lib/{name}") and (installed, other) == (name, "libmpi.so")


def test_torchrun_wins_inside_a_slurm_step():
    assert discover(SRUN | TORCHRUN).source == "torchrun"


def test_a_plain_process_is_one_rank():
    assert discover({}) == Launch(0, 1, 0, 1, "localhost", 0, "single")


@pytest.mark.parametrize(
    "environ",
    [
        SBATCH,
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4"},
        SBATCH | {"SLURM_STEP_ID": "4294967290"},  # salloc's shell as an interactive step
        SBATCH | {"SLURM_STEP_ID": "4294967291"},
    ],
)
def test_a_script_under_sbatch_or_a_shell_under_salloc_is_one_rank(environ):
    assert discover(environ).source == "single"


def test_srun_tasks_count_by_step_not_by_allocation():
    launch = discover(SRUN)
    assert (launch.rank, launch.world_size) == (3, 4)
    assert (launch.local_rank, launch.local_world_size) == (0, 1)
    assert (launch.addr, launch.source) == ("localhost", "slurm")


def test_all_tasks_of_a_step_derive_one_port_and_another_step_another():
    ports = {discover(SRUN | {"SLURM_PROCID": str(rank)}).port for rank in range(4)}
    assert len(ports) == 1 and 1024 < min(ports) < 32768
    assert discover(SRUN | {"SLURM_STEP_ID": "3"}).port not in ports


def test_master_addr_and_port_override_those_of_slurm():
    launch = discover(SRUN | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4000"})
    assert (launch.addr, launch.port) == ("10.1.1.1", 4000)


def test_srun_with_pmi2_is_slurm_not_mpi():
    assert discover(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}).source == "slurm"


def test_a_world_size_from_a_batch_script_does_not_hide_the_slurm_step():
    assert discover(SRUN | {"WORLD_SIZE": "4"}).source == "slurm"


def test_a_head_node_without_an_address_is_an_error_that_names_master_addr(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"no-such-host\.invalid.* set MASTER_ADDR"):
        discover(SRUN | {"SLURM_STEP_NODELIST": "no-such-host.invalid"})


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_partial_torchrun_environment_names_what_is_missing(name):
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=name if name != "RANK" else "RANK is not"):
        discover(environ)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE='eight'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT=''"),
        ({"MASTER_PORT": "70000"}, "70000 must be from 1 to 65535"),
        ({"RANK": "8"}, "rank 8 .* below the 8 ranks"),
        ({"LOCAL_RANK": "4"}, "local rank 4 .* below the 4 ranks of its host"),
        ({"LOCAL_WORLD_SIZE": "9"}, "9 ranks on this host, but only 8 in all"),
    ],
)
def test_wrong_numbers_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        discover(TORCHRUN | changes)


@given(st.dictionaries(st.sampled_from(sorted(TORCHRUN)), st.text(max_size=5)))
def test_any_torchrun_environment_is_a_launch_or_a_value_error(changes):
    try:
        launch = discover(TORCHRUN | changes)
    except ValueError:
        return
    assert 0 <= launch.rank < launch.world_size


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-010,012],login1", "gpu003"),
        ("gpu[9,12-14]", "gpu9"),
        ("rack[1-2]node[04-16]", "rack1node04"),
        ("a1,b[2-3]", "a1"),
        ("gpu-a[1-2]-ib,x", "gpu-a1-ib"),
    ],
)
def test_first_node_of_a_slurm_node_list(nodelist, first):
    assert first_node(nodelist) == first


def test_tasks_per_node_expand():
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="of the form"):
        expand_tasks_per_node("2(y3)")


def rank_info(rank: int, host: str = "a", gpu: str | None = None, cores=range(8)) -> RankInfo:
    why = "" if gpu else "no CUDA device"
    return RankInfo(
        rank=rank, host=host, cores=list(cores), digest="d", gpu=gpu, no_gpu=why, error=None
    )


def test_cores_are_divided_among_the_ranks_that_may_use_them():
    shared = [rank_info(0), rank_info(1), rank_info(2)]
    assert [share_of_cores(rank, shared) for rank in range(3)] == [2, 2, 2]
    bound = [rank_info(0, cores=range(4)), rank_info(1, cores=range(4, 8))]
    assert [share_of_cores(rank, bound) for rank in range(2)] == [4, 4]
    mixed = [rank_info(0, cores=range(8)), rank_info(1, cores=range(4)), rank_info(2, host="b")]
    assert [share_of_cores(rank, mixed) for rank in range(3)] == [6, 2, 8]


def test_more_ranks_than_cores_still_get_a_thread():
    assert share_of_cores(0, [rank_info(rank, cores=[0, 1]) for rank in range(4)]) == 1


@pytest.mark.parametrize("text", ["0", "-1", "1000000", "9" * 5000, "\u00b2", "4,2", ""])
def test_an_omp_num_threads_that_is_no_number_of_threads_counts_as_not_set(text):
    launch = Launch(0, 1, 0, 1, "localhost", 0, "single")
    config = Config(model=ModelConfig(path="x"))
    infos = [rank_info(0, cores=range(6))]
    environ = {"OMP_NUM_THREADS": text}
    assert bootstrap._num_threads(config, launch, environ, infos) == 6
    assert bootstrap._num_threads(config, launch, {"OMP_NUM_THREADS": "3"}, infos) == 3


def test_auto_takes_cuda_only_when_every_rank_has_a_gpu_of_its_own():
    own = [rank_info(0, "a", "gpu0"), rank_info(1, "a", "gpu1"), rank_info(2, "b", "gpu0")]
    assert choose_device("auto", own) == choose_device("cuda", own) == "cuda"
    assert choose_device("cpu", own) == "cpu"
    assert choose_device("auto", [*own, rank_info(3, "b")]) == "cpu"
    assert choose_device("auto", [*own, rank_info(3, "b", "gpu0")]) == "cpu"


def test_cuda_names_the_ranks_without_a_gpu_and_those_that_share_one():
    ranks = [
        rank_info(0, "a", "gpu0"),
        rank_info(1, "a", "gpu0"),
        rank_info(2, "b"),
        rank_info(3, "b"),
    ]
    with pytest.raises(RankError) as caught:
        choose_device("cuda", ranks)
    text = str(caught.value)
    assert "ranks 0, 1 on a: share one GPU" in text
    assert "ranks 2, 3 on b: no CUDA device" in text and "runtime.device=cpu" in text


def seen(rank: int, *gpus: str, host: str = "a") -> RankInfo:
    """A rank that sees these GPUs and would take the one of its number."""
    own = gpus[rank % 8] if len(gpus) > rank % 8 else None
    own = gpus[0] if len(gpus) == 1 else own
    info = rank_info(rank, host, own)
    return replace(info, gpus=list(gpus))


def assigned(*infos: RankInfo) -> list[str | None]:
    return [info.gpu for info in assign_gpus(infos)]


def test_ranks_that_see_all_gpus_take_the_one_of_their_local_rank():
    gpus = [f"gpu{index}" for index in range(8)]
    assert assigned(*(seen(rank, *gpus) for rank in range(8))) == gpus
    assert assigned(*(seen(rank, *gpus) for rank in (5, 2))) == ["gpu5", "gpu2"]


def test_ranks_that_see_one_gpu_each_take_it():
    infos = [seen(rank, f"gpu{rank}") for rank in range(8)]
    assert assigned(*infos) == [f"gpu{rank}" for rank in range(8)]
    assert choose_device("cuda", assign_gpus(infos)) == "cuda"


def test_ranks_that_see_several_gpus_of_their_own_take_one_of_them():
    infos = [seen(rank, f"gpu{2 * rank}", f"gpu{2 * rank + 1}") for rank in range(4)]
    assert infos[2].gpu is None
    assert assigned(*infos) == ["gpu0", "gpu2", "gpu4", "gpu6"]


def test_ranks_of_one_host_on_the_same_gpu_are_refused_in_words():
    infos = [seen(0, "gpu0"), seen(1, "gpu0"), seen(2, "gpu0", host="b")]
    with pytest.raises(RankError, match="ranks 0, 1 on a: share one GPU, gpu0"):
        choose_device("cuda", assign_gpus(infos))
    assert choose_device("auto", assign_gpus(infos)) == "cpu"


def test_a_host_that_lacks_gpus_keeps_what_its_ranks_say():
    infos = [seen(rank, "gpu0", "gpu1") for rank in range(3)]
    assert assigned(*infos) == ["gpu0", "gpu1", None]


def device_of(monkeypatch, infos: list[tuple[int, list[str]]], rank: int) -> torch.device:
    """The device that `start` sets for one rank of a host, by each rank's number and its GPUs."""
    gpus = infos[rank][1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    properties = [SimpleNamespace(uuid=gpu) for gpu in gpus]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(bootstrap, "create_groups", lambda *arguments: None)
    host = socket.gethostname()
    others = [seen(number, *visible, host=host) for number, visible in infos]

    def join(store, own, world_size, timeout):
        return [own if other.rank == rank else other for other in others], "run"

    monkeypatch.setattr(bootstrap, "join", join)
    monkeypatch.setattr(bootstrap, "_open_store", lambda *arguments: dist.HashStore())
    config = Config(model=ModelConfig(path="x"), runtime=RuntimeConfig(device="cuda"))
    size = len(infos)
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(size),
    }
    bootstrap.start(config, step)
    return chosen[0]


def test_a_task_that_sees_one_gpu_runs_on_device_0_whatever_its_local_rank(monkeypatch):
    infos = [(rank, [f"GPU-{rank}"]) for rank in range(8)]
    assert device_of(monkeypatch, infos, 7) == torch.device("cuda", 0)


def test_a_task_that_sees_all_gpus_runs_on_the_device_of_its_local_rank(monkeypatch):
    infos = [(rank, ["GPU-0", "GPU-1", "GPU-2"]) for rank in range(3)]
    assert device_of(monkeypatch, infos, 2) == torch.device("cuda", 2)


def test_a_task_runs_on_the_first_of_two_gpus_of_its_own(monkeypatch):
    infos = [(rank, [f"GPU-{rank}a", f"GPU-{rank}b"]) for rank in range(4)]
    assert device_of(monkeypatch, infos, 1) == torch.device("cuda", 0)
    assert device_of(monkeypatch, infos, 3) == torch.device("cuda", 0)


def test_tasks_that_are_bound_to_the_same_gpu_are_refused(monkeypatch):
    infos = [(rank, ["GPU-0"]) for rank in range(2)]
    with pytest.raises(RankError, match="ranks 0, 1 on .*share one GPU, GPU-0"):
        device_of(monkeypatch, infos, 1)


def test_a_device_without_uuid_is_known_by_its_place_on_the_bus(monkeypatch):
    places = [SimpleNamespace(pci_domain_id=0, pci_bus_id=n, pci_device_id=0) for n in (7, 8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", places.__getitem__)
    gpus = find_gpus(LocalRank(1, 2), {})
    assert len(set(gpus.ids)) == 2 and gpus.index == 1


def test_a_driver_that_does_not_answer_is_a_reason_not_an_exception(monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA-capable device(s) is/are busy\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    gpus = find_gpus(LocalRank(1, 2), {})
    assert gpus.index is None and gpus.why_none.endswith("CUDA-capable device(s) is/are busy")


def test_merged_errors_hold_each_text_once_with_its_ranks():
    assert merge_errors({0: "same", 1: "same"}, 2) == "same"
    assert merge_errors({1: "one", 4: "two", 6: "one"}, 8) == "ranks 1, 6: one\nrank 4: two"


SCRIPTS = [path.relative_to(LAUNCH).as_posix() for path in sorted(LAUNCH.glob("*/*.*sh"))]
SCRIPTS += [path.relative_to(LAUNCH).as_posix() for path in sorted(LAUNCH.glob("*/*.sbatch"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_cluster_scripts_parse(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cluster_scripts_are_shellcheck_clean(script):
    command = ["shellcheck", "--external-sources", LAUNCH / script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=LAUNCH.parent)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("gpus", "tasks", "warns"),
    [("8", "1", True), ("8", "8", False), ("1", "2", False), (None, "1", False), ("", "1", False)],
)
def test_srun_script_warns_of_gpus_that_get_no_rank_and_runs(tmp_path, gpus, tasks, warns):
    scripts = tmp_path / "launch/slurm"
    scripts.mkdir(parents=True)
    (scripts / "common.sh").write_text('announce() { :; }\nrun_step() { echo "ran $*"; }\n')
    environ = {
        "PATH": os.environ["PATH"],
        "LOCKSTEP": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": tasks,
        **({} if gpus is None else {"SLURM_GPUS_ON_NODE": gpus}),
    }
    command = ["bash", LAUNCH / "slurm/infer_srun.sbatch", "--config", "x"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    assert done.stdout.startswith(f"ran --ntasks={2 * int(tasks)} ")
    if warns:
        assert "warning: 8 GPUs on each node" in done.stderr and "7 idle" in done.stderr
        assert "--ntasks-per-node=8" in done.stderr
    else:
        assert done.stderr == ""
