"""Loading on several ranks: each reads its own weights, and an error of one is raised by all.

python -m pytest tests/distributed/test_weights.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import engine.weights.reader as weight_reader
from engine.config import Config, ModelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.groups import Group, Topology, expert_range
from engine.weights.loader import CheckpointError, fill_dummy, load_weights
from engine.weights.safetensors_header import read_header
from engine.weights.slot import WeightSlot
from tests.helpers.ranks import run_ranks

SHAPE = (300, 40)


def start() -> Topology:
    runtime = RuntimeConfig(timeout_s=30.0, device="cpu")
    return bootstrap.start(Config(model=ModelConfig(path="unused"), runtime=runtime))


def expert(number: int) -> str:
    return f"experts.{number}.w1.weight"


def write(folder: Path, num_experts: int) -> Path:
    tensors = {expert(number): torch.full(SHAPE, float(number)) for number in range(num_experts)}
    save_file(tensors | {"shared": torch.ones(7)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def slots_of(group: Group, num_experts: int) -> list[WeightSlot]:
    """Return the slots of the shared tensor and of this rank's experts, stacked as in the layer."""
    first, count = expert_range(num_experts, group.size, group.rank)
    stacked = torch.full((count, *SHAPE), 77.0)
    slots = [WeightSlot(expert(first + i), stacked[i], SHAPE) for i in range(count)]
    return [*slots, WeightSlot("shared", torch.zeros(7), (7,), kind="norm")]


def load(rank: int, folder: Path, num_experts: int) -> tuple[list[float], int] | str:
    """Return the first value of each of this rank's experts and the bytes read, or the error."""
    control = start().control
    slots = slots_of(control, num_experts)
    try:
        report = load_weights(folder, slots, group=control)
    except CheckpointError as error:
        return str(error)
    assert all((slot.target == slot.target.flatten()[0]).all() for slot in slots)
    return [float(slot.target[0, 0]) for slot in slots[:-1]], report.bytes_read


def test_each_rank_reads_only_its_own_experts(tmp_path):
    path = write(tmp_path, 7)
    common = read_header(path)[1] + 7 * 4
    size = SHAPE[0] * SHAPE[1] * 4
    assert run_ranks(load, 3, tmp_path, 7) == [
        ([0.0, 1.0, 2.0], common + 3 * size),
        ([3.0, 4.0], common + 2 * size),
        ([5.0, 6.0], common + 2 * size),
    ]


def test_more_ranks_than_experts_load_too(tmp_path):
    write(tmp_path, 2)
    assert [values for values, _ in run_ranks(load, 3, tmp_path, 2)] == [[0.0], [1.0], []]


def overwrite(path: Path, name: str, value: float) -> None:
    entry = read_header(path)[0][name]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(torch.full(entry.shape, value).numpy().tobytes())


def read_without_sharing(rank: int, folder: Path) -> bool:
    """Return whether the read itself, without a group, finds an error."""
    group = start().control
    slots = slots_of(group, 2)
    try:
        load_weights(folder, slots, ignored=["experts"])
    except CheckpointError:
        return True
    return False


def test_a_rank_never_reads_another_ranks_experts(tmp_path):
    overwrite(write(tmp_path, 2), expert(1), float("nan"))
    assert run_ranks(read_without_sharing, 2, tmp_path) == [False, True]


def test_nan_in_one_ranks_expert_is_raised_by_all_and_names_rank_tensor_and_file(tmp_path):
    path = write(tmp_path, 4)
    overwrite(path, expert(3), float("nan"))
    errors = run_ranks(load, 2, tmp_path, 4)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"rank 1: {expert(3)} in {path}: holds NaN or infinity")


def test_a_tensor_that_only_one_rank_misses_is_raised_by_all(tmp_path):
    write(tmp_path, 3)
    errors = run_ranks(load, 2, tmp_path, 4)
    assert errors[0] == errors[1]
    assert f"1 tensors are missing; is config.json of this checkpoint?: {expert(3)}" in errors[0]


def test_an_expert_that_no_rank_owns_is_extra_on_all(tmp_path):
    write(tmp_path, 5)
    errors = run_ranks(load, 2, tmp_path, 4)
    assert errors[0] == errors[1]
    assert "1 tensors belong to no part of the model" in errors[0]
    assert f": {expert(4)} in model.safetensors" in errors[0]


def load_own_copy(rank: int, folder: Path) -> tuple[list[float], int] | str:
    return load(rank, folder / str(rank), 2)


def test_hosts_with_different_files_are_reported(tmp_path):
    for rank, num_experts in ((0, 2), (1, 3)):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank), num_experts)
    errors = run_ranks(load_own_copy, 2, tmp_path)
    assert all("different files" in error for error in errors)
    assert all("model.safetensors differs on rank 0 and rank 1" in error for error in errors)


def test_a_file_that_one_host_lacks_is_named(tmp_path):
    for rank, stray in ((0, "a"), (1, "b")):
        folder = tmp_path / str(rank)
        folder.mkdir()
        files = {
            "c.safetensors": {"w": torch.ones(2)},
            f"{stray}.safetensors": {"v": torch.ones(2)},
        }
        for file, tensors in files.items():
            save_file(tensors, folder / file)
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    for error in run_ranks(load_own_copy, 2, tmp_path):
        assert "a.safetensors is only on rank 0; b.safetensors is only on rank 1" in error


def test_a_checkpoint_that_one_host_lacks_is_raised_by_all(tmp_path):
    (tmp_path / "0").mkdir()
    write(tmp_path / "0", 2)
    errors = run_ranks(load_own_copy, 2, tmp_path)
    assert errors[0] == errors[1]
    assert errors[0].startswith("rank 1: ") and "no such folder" in errors[0]


def load_ignoring_on_rank_1(rank: int, folder: Path) -> str:
    control = start().control
    try:
        load_weights(folder, slots_of(control, 2), ignored=["stray"] * rank, group=control)
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_that_ignore_different_names_still_agree(tmp_path):
    tensors = {expert(0): torch.ones(SHAPE), expert(1): torch.ones(SHAPE)}
    save_file(
        tensors | {"shared": torch.ones(7), "stray": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    errors = run_ranks(load_ignoring_on_rank_1, 2, tmp_path)
    assert errors[0] == errors[1]
    assert errors[0].startswith("rank 0: ") and "stray" in errors[0]


def load_slowly_on_rank_1(rank: int, folder: Path) -> tuple[list[float], int] | str:
    patch = pytest.MonkeyPatch()
    patch.setattr(weight_reader, "_STATUS_INTERVAL_S", 0.2)
    if rank == 1:
        read = weight_reader._read_job

        def slow(*args) -> int:
            time.sleep(1.0)
            return read(*args)

        patch.setattr(weight_reader, "_read_job", slow)
    return load(rank, folder, 2)


def test_a_rank_that_is_done_waits_for_a_slower_reader(tmp_path):
    write(tmp_path, 2)
    assert [result[0] for result in run_ranks(load_slowly_on_rank_1, 2, tmp_path)] == [[0.0], [1.0]]


def dummy(rank: int, num_experts: int) -> dict[str, torch.Tensor]:
    slots = slots_of(start().control, num_experts)
    fill_dummy(slots, seed=5)
    return {slot.name: slot.target for slot in slots}


def test_dummy_weights_are_the_same_on_one_rank_and_on_three():
    (single,) = run_ranks(dummy, 1, 5)
    parts = run_ranks(dummy, 3, 5)
    together = {name: value for part in parts for name, value in part.items()}
    assert together.keys() == single.keys()
    assert all(torch.equal(together[name], single[name]) for name in single)
