"""Host data reaches the device through one door, which never stops the host.

Run: pytest tests/unit/ops/test_to_device.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from engine.ops.to_device import all_to_device, to_device

ROOT = Path(__file__).resolve().parents[3]


class Host:
    """Stands for a CPU tensor on a machine that has a GPU."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def pin_memory(self) -> Host:
        self.calls.append(("pin_memory",))
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Host:
        self.calls.append(("to", device, non_blocking))
        return self


def test_on_the_cpu_nothing_is_copied():
    host = torch.arange(5)
    assert to_device(host, torch.device("cpu")) is host


def test_a_copy_to_a_gpu_is_pinned_first_and_then_queued():
    host, device = Host(), torch.device("cuda", 1)
    to_device(cast(torch.Tensor, host), device)
    assert host.calls == [("pin_memory",), ("to", device, True)]


def test_several_tensors_are_sent_by_one_copy_and_keep_dtype_shape_and_alignment(monkeypatch):
    hosts = [
        torch.arange(3, dtype=torch.int32),
        torch.tensor([True, False, True]),
        torch.empty(0, 2, dtype=torch.int64),
        torch.from_numpy(np.zeros((0, 0), dtype=np.int32)),
        torch.from_numpy(np.arange(0)),
        torch.arange(6).view(2, 3),
        torch.arange(5, dtype=torch.float64)[None],
    ]
    sent = []

    def copy(host, device):
        sent.append(host)
        return host.clone()

    monkeypatch.setattr("engine.ops.to_device.to_device", copy)
    for one in (hosts, []):
        copies = all_to_device(one, torch.device("cuda", 0))
        assert len(copies) == len(one)
        for host, made in zip(one, copies, strict=True):
            assert made.dtype == host.dtype and torch.equal(made, host)
            assert made.data_ptr() % 16 == 0 or not made.numel()
    assert len(sent) == 2
    assert all_to_device(hosts, torch.device("cpu"))[0] is hosts[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_copy_to_a_gpu_does_not_synchronise():
    device = torch.device("cuda", 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = to_device(torch.arange(5), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copy.tolist() == [0, 1, 2, 3, 4]


def test_no_other_code_of_a_step_copies_to_the_device():
    step = ["engine/moe", "engine/layers", "engine/models", "engine/generation"]
    files = [path for folder in step for path in (ROOT / folder).rglob("*.py")]
    files += (ROOT / "kernels").glob("*.py")
    # Tables of positions are made with the model.
    allowed = {"to_device.py", "rotary.py", "fixed_rotary.py", "query_scale.py"}
    files = [path for path in files if path.name not in allowed]
    assert len(files) > 50
    copy = re.compile(
        r"pin_memory\(|non_blocking|torch\.tensor\(.*\bdevice=|\.to\((self\.)?_?device"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if copy.search(line)
    ]
    assert found == []
