"""What a rank sets in its process once it knows its GPU.

Run: pytest tests/unit/distributed/test_rank_device.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.distributed import rank_device
from engine.distributed.rank_device import bind_to_gpu_cpus, parse_cpu_list
from engine.distributed.rendezvous import RankInfo

# Sets the device as in a container whose environment allows TF32; prints whether it still is.
IN_A_CONTAINER = """
import os, torch
torch.cuda.set_device = lambda device: None
assert torch.backends.cuda.matmul.allow_tf32
from engine.distributed.rank_device import use_gpu
use_gpu(torch.device("cuda", 0))
print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
print(torch.get_float32_matmul_precision(), os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"])
"""
GPU = torch.device("cuda", 0)


def test_float32_is_not_tf32_where_the_container_exports_the_override() -> None:
    environ = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", IN_A_CONTAINER]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False", "highest", "0"], done.stderr


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,8\n", {0, 1, 2, 8}), ("5", {5}), ("\n", set()), ("0-0", {0})]
)
def test_a_cpu_list_is_read_as_the_kernel_writes_it(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "0-9999999999"])
def test_what_is_no_cpu_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"list of CPUs|invalid literal"):
        parse_cpu_list(text)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[int]]]:
    """The threads that were bound, and to which CPUs; GPU 0 is at 0001:0a:00.0."""
    calls: list[tuple[int, set[int]]] = []
    properties = SimpleNamespace(pci_domain_id=1, pci_bus_id=10, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        rank_device.os, "sched_setaffinity", lambda thread, cpus: calls.append((thread, cpus))
    )
    return calls


def pci(folder: Path, cpus: str) -> Path:
    (folder / "0001:0a:00.0").mkdir()
    (folder / "0001:0a:00.0" / "local_cpulist").write_text(cpus)
    return folder


def ranks(*cores: list[int], host: str = "h") -> list[RankInfo]:
    return [RankInfo(rank=rank, host=host, cores=each) for rank, each in enumerate(cores)]


def test_every_thread_of_a_rank_is_bound_to_the_cpus_of_its_gpu(
    bound: list[tuple[int, set[int]]], tmp_path: Path
) -> None:
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    infos = ranks([0, 1, 2, 3], [0, 1, 2, 3])
    assert bind_to_gpu_cpus(GPU, 1, infos, pci(tmp_path, "2-3,6-7\n")) == 2
    stop.set()
    other.join()
    assert {0, threading.get_native_id(), other.native_id} <= {thread for thread, _ in bound}
    assert all(cpus == {2, 3} for _, cpus in bound)


@pytest.mark.parametrize(
    ("infos", "cpus"),
    [
        (ranks([0, 1], [2, 3]), "0-3"),  # the launcher has bound them
        (ranks([0, 1], [0, 1]), "4-7"),  # the container has none of these
        (ranks([0, 1], [0, 1]), "0-7"),  # all that the rank has are near
        (ranks([0, 1], [0, 1]), "nonsense"),
        (ranks([0, 1], [0, 1]), None),
    ],
)
def test_a_rank_stays_where_it_is(
    infos: list[RankInfo], cpus: str | None, bound: list[tuple[int, set[int]]], tmp_path: Path
) -> None:
    folder = tmp_path if cpus is None else pci(tmp_path, cpus)
    assert bind_to_gpu_cpus(GPU, 0, infos, folder) is None
    assert not bound


def test_cores_of_other_hosts_do_not_matter(
    bound: list[tuple[int, set[int]]], tmp_path: Path
) -> None:
    infos = [*ranks([0, 1, 2, 3]), RankInfo(rank=1, host="other", cores=[0, 1])]
    assert bind_to_gpu_cpus(GPU, 0, infos, pci(tmp_path, "0-1")) == 2


def test_a_rank_that_may_not_be_bound_runs_where_it_is(
    bound: list[tuple[int, set[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: int, cpus: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(rank_device.os, "sched_setaffinity", refuse)
    assert bind_to_gpu_cpus(GPU, 0, ranks([0, 1, 2, 3]), pci(tmp_path, "0-1")) is None


def test_a_torch_without_the_pci_address_binds_nothing(
    bound: list[tuple[int, set[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: unknown)
    assert bind_to_gpu_cpus(GPU, 0, ranks([0, 1, 2, 3]), pci(tmp_path, "0-1")) is None
