"""DeepEP and Transformer Engine's EP: why they are refused, and the room that they take."""

from __future__ import annotations

import dataclasses
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.cuda import nccl

from engine.config.loader import config_from_tree
from engine.distributed.groups import Group
from engine.moe.dispatch.transports import deep_ep, te_ep
from engine.moe.dispatch.transports.choice import TransportPool
from engine.moe.dispatch.transports.transport import Limits, Setup
from tests.helpers import fake_deep_ep, fake_te_ep

MODULES: dict[str, Any] = {"deepep": deep_ep, "te_ep": te_ep}


class OneOf:
    """A process group of which nothing but its size is asked."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def _setup(size: int = 8, **other: Any) -> Setup:
    handle: Any = OneOf(size)
    made = Setup(
        group=Group(0, size, tuple(range(size)), handle),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        width=2048,
        first_experts=tuple(range(0, 16 * size + 1, 16)),
        top_k=8,
    )
    return dataclasses.replace(made, **other)


def _moe(**dispatch: Any) -> Any:
    tree = {"model": {"path": "unused"}, "moe": {"dispatch": dispatch}}
    return config_from_tree(tree).moe


@pytest.fixture
def a_gpu_and_both(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has all that is needed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(nccl, "version", lambda: (2, 30, 7))
    for name, module in {
        "deep_ep": fake_deep_ep.fake_module(),
        **fake_te_ep.fake_modules(),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return monkeypatch


@pytest.mark.parametrize("name", MODULES)
def test_where_all_is_there_a_transport_is_made(name: str, a_gpu_and_both) -> None:
    asked = {"experts": "grouped_mm", "takes_device_counts": True, "has_copies": False}
    transport = TransportPool().get(_setup(), _moe(transport=name), **asked)
    assert transport is not None
    assert (transport.name, transport.sums) == (name, True)


def test_a_pool_ends_the_librarys_use_of_the_group_once(a_gpu_and_both) -> None:
    asked = {"experts": "grouped_mm", "takes_device_counts": True, "has_copies": False}
    pool = TransportPool()
    transport = pool.get(_on_cpu(_setup()), _moe(transport="nccl"), **asked)
    assert transport is None
    pool._made["te_ep", _setup()] = made = te_ep.make(_on_cpu(_setup()))
    made.reserve(Limits(tokens=10, sent=80, received=100))
    assert fake_te_ep.is_ep_bootstrapped()
    pool.release()
    assert not fake_te_ep.is_ep_bootstrapped()
    pool.release()


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_library_is_named_with_its_version(name: str, a_gpu_and_both) -> None:
    for module in ("deep_ep", *fake_te_ep.fake_modules()):
        a_gpu_and_both.delitem(sys.modules, module)
    wanted = {"deepep": r"DeepEP 1\.2\.1 or newer", "te_ep": r"Transformer Engine 2\.20 or newer"}
    asked = {"experts": "grouped_mm", "takes_device_counts": True, "has_copies": False}
    words = f"transport = '{name}': it needs {wanted[name]}.* not installed; set moe.dispatch"
    with pytest.raises(ValueError, match=words):
        TransportPool().get(_setup(), _moe(transport=name), **asked)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"dtype": torch.float16}, "bfloat16 alone, and these are float16"),
        ({"width": 2052}, "multiple of 16 bytes, and the model's are 2052 numbers"),
        ({"top_k": 33}, "at most 32 experts per token"),
    ],
)
@pytest.mark.parametrize("name", MODULES)
def test_what_a_library_does_not_take_is_named(name, other, word, a_gpu_and_both) -> None:
    assert word in MODULES[name].obstacle(_setup(**other), _moe())


@pytest.mark.parametrize("name", MODULES)
def test_rows_in_fp8_and_older_gpus_are_refused(name: str, a_gpu_and_both) -> None:
    assert "moe.dispatch.dtype = 'fp8'" in MODULES[name].obstacle(_setup(), _moe(dtype="fp8"))
    a_gpu_and_both.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "9.0 or more, and this one's is 8.0" in MODULES[name].obstacle(_setup(), _moe())


@pytest.mark.parametrize("size", [3, 16])
def test_deep_ep_is_for_ranks_of_one_host(size: int, a_gpu_and_both) -> None:
    assert f"parallel.expert is {size}" in deep_ep.obstacle(_setup(size), _moe())


def test_an_older_nccl_is_named(a_gpu_and_both) -> None:
    a_gpu_and_both.setattr(nccl, "version", lambda: (2, 28, 9))
    assert "NCCL 2.30.4 or newer, and this torch has 2.28.9" in te_ep.obstacle(_setup(), _moe())


def test_a_transformer_engine_without_expert_parallelism_is_named(a_gpu_and_both) -> None:
    package = ModuleType("transformer_engine.pytorch")
    package.__path__ = []
    a_gpu_and_both.setitem(sys.modules, "transformer_engine.pytorch", package)
    a_gpu_and_both.delitem(sys.modules, "transformer_engine.pytorch.ep")
    assert "installed one has no transformer_engine.pytorch.ep" in te_ep.obstacle(_setup(), _moe())


@pytest.mark.parametrize("name", MODULES)
def test_an_import_that_fails_says_why_in_one_line(name: str, a_gpu_and_both) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("undefined symbol: _ZN3c10\nand a second line")

    library = {"deepep": "deep_ep_library", "te_ep": "te_ep"}[name]
    a_gpu_and_both.setattr(
        f"engine.moe.dispatch.transports.{library}.importlib.import_module", fail
    )
    words = MODULES[name].obstacle(_setup(), _moe())
    assert words.endswith("whose import fails: undefined symbol: _ZN3c10")


def test_ids_of_32_bits_are_refused(a_gpu_and_both) -> None:
    a_gpu_and_both.setattr(sys.modules["deep_ep"], "topk_idx_t", torch.int32)
    assert "ids of 32 bits" in deep_ep.obstacle(_setup(), _moe())


def _on_cpu(setup: Setup) -> Setup:
    return dataclasses.replace(setup, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("received", "tokens", "rows"),
    [
        # Without capacity: 8 ranks of 1,000 tokens, each with 8 rows on this rank.
        (64_000, 8_000, 64_000),
        # With capacity at 1.5: 16 experts of 750 rows, which may be as many tokens.
        (12_000, 8_000, 12_000),
        (5_000, 5_000, 5_000),
    ],
)
def test_deep_ep_receives_into_the_bound_of_capacity(received, tokens, rows, caplog) -> None:
    transport = deep_ep.DeepEP(_on_cpu(_setup()), fake_deep_ep.fake_module())
    with caplog.at_level(logging.INFO):
        taken = transport.reserve(Limits(tokens=1_000, sent=8_000, received=received))
    made = fake_deep_ep.Buffer.made[-1]
    buffers = made.num_nvl_bytes + made.num_rdma_bytes
    assert taken == buffers + tokens * (4096 + 8 * 12) + rows * 4096
    assert f"at most {tokens} tokens in {rows} rows received; all tokens" in caplog.text
    assert made.num_qps_per_rank == 16
    transport.close()
    assert not made.alive


def test_equal_limits_keep_the_buffers_and_larger_ones_replace_them() -> None:
    transport = deep_ep.DeepEP(_on_cpu(_setup()), fake_deep_ep.fake_module())
    limits = Limits(tokens=100, sent=800, received=900)
    taken = transport.reserve(limits)
    first = fake_deep_ep.Buffer.made[-1]
    assert transport.reserve(dataclasses.replace(limits, received=500)) == taken
    assert fake_deep_ep.Buffer.made[-1] is first
    assert transport.reserve(dataclasses.replace(limits, tokens=200)) > taken
    assert not first.alive and fake_deep_ep.Buffer.made[-1].alive


@pytest.mark.parametrize("other", [{"width": 2880}, {"top_k": 10}])
def test_sizes_that_low_latency_has_no_kernel_for_take_no_memory_for_it(other: Any) -> None:
    transport = deep_ep.DeepEP(_on_cpu(_setup(**other)), fake_deep_ep.fake_module())
    transport.reserve(Limits(tokens=100, sent=1000, received=1000))
    made = fake_deep_ep.Buffer.made[-1]
    assert (made.num_rdma_bytes, made.low_latency_mode) == (0, False)


def test_what_the_library_says_at_its_start_is_passed_on(monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("NVSHMEM is disabled during compilation")

    module = fake_deep_ep.fake_module()
    monkeypatch.setattr(fake_deep_ep.Buffer, "__init__", fail)
    transport = deep_ep.DeepEP(_on_cpu(_setup()), module)
    with pytest.raises(ValueError, match="cannot start here: NVSHMEM is disabled.*; set moe.disp"):
        transport.reserve(Limits(tokens=100, sent=800, received=900))


def test_transformer_engine_takes_one_shape_per_process(caplog) -> None:
    library = fake_te_ep.fake_modules()["transformer_engine.pytorch.ep"]
    limits = Limits(tokens=1_000, sent=8_000, received=12_000)
    one = te_ep.TransformerEngineEP(_on_cpu(_setup()), library)
    other = te_ep.TransformerEngineEP(_on_cpu(_setup(width=4096)), library)
    with caplog.at_level(logging.INFO):
        assert one.reserve(limits) == 12_000 * (4096 + 4)
    assert "at most 12000 rows received; all tokens of all ranks would be 64000 rows" in caplog.text
    with pytest.raises(ValueError, match="MoE layers of one shape in a process"):
        other.reserve(limits)
    one.release()
    # The library's least capacity is the tokens that a rank sends.
    assert other.reserve(dataclasses.replace(limits, received=10)) == 1_000 * (8192 + 4)
    other.release()
