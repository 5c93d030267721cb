"""engine/generation/builder.py: what it chooses, and what does not fit into memory by setting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig, MoEConfig
from engine.config.loader import config_from_tree
from engine.generation.builder import profiler_every, reserve_rows
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.moe.policy.policy import Policy


def test_rows_that_do_not_fit_into_memory_name_max_batch_tokens():
    def reserve(sent: int, received: int, most_tokens: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    router = SimpleNamespace(top_k=2, num_experts=8)
    layer = SimpleNamespace(
        spec=SimpleNamespace(router=router, hidden=16, width=16, ffn=32),
        instances=Instances(LayerPlacement.contiguous(8, 2), 2),
        on_device=SimpleNamespace(transport=None),
        reserve=reserve,
    )
    model: Any = SimpleNamespace(moe_layers=[layer], dtype=torch.float32)
    topology: Any = SimpleNamespace(expert=SimpleNamespace(size=2), device=torch.device("cpu"))
    moe = MoEConfig(capacity=CapacityConfig(policy="token_drop"))
    config = Config(model=ModelConfig(path="x"), moe=moe)
    with pytest.raises(ValueError, match=r"^scheduler\.max_batch_tokens = 2048: the rows .*lower"):
        reserve_rows(model, config, topology)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def every(device: torch.device, tree: dict[str, Any]) -> int:
    return profiler_every(config_from_tree({"model": {"path": "models/none"}, **tree}), device)


def test_every_step_is_timed_whole_on_the_cpu_and_each_16th_on_cuda():
    assert every(CPU, {}) == 1 and every(CUDA, {}) == 16


@pytest.mark.parametrize(
    "tree",
    [
        {"profiler": {"spans": "spans"}},
        {"profiler": {"deepspeed_comms": True}},
        {"moe": {"capacity": {"policy": "token_drop", "speed_aware": True}}},
    ],
    ids=str,
)
def test_every_step_is_timed_whole_on_cuda_where_something_reads_all_of_them(tree):
    assert every(CUDA, tree) == 1
    tree = {**tree, "profiler": {**tree.get("profiler", {}), "every": 8}}
    assert every(CUDA, tree) == every(CPU, tree) == 8, "what the user sets holds"


def test_row_buffers_hold_the_layer_with_most_experts_per_token():
    reserved: list[tuple[int, int, int]] = []

    def layer(top_k: int) -> Any:
        return SimpleNamespace(
            spec=SimpleNamespace(
                router=SimpleNamespace(top_k=top_k, num_experts=8), hidden=16, width=16, ffn=32
            ),
            instances=Instances(LayerPlacement.contiguous(8, 4), 4),
            on_device=SimpleNamespace(transport=None),
            reserve=lambda sent, received, _: reserved.append((top_k, sent, received)) or 0,
            row_limit=None,
        )

    layers = [layer(1), layer(4), layer(2)]
    buffers = SimpleNamespace(num_bytes=0)
    model: Any = SimpleNamespace(moe_layers=layers, dtype=torch.float32, row_buffers=buffers)
    topology: Any = SimpleNamespace(expert=SimpleNamespace(size=4), device=torch.device("cpu"))
    tree = {
        "model": {"path": "x"},
        "scheduler": {"max_batch_tokens": 100, "max_sequences": 10},
        "moe": {"capacity": {"policy": "token_drop", "factor": "1.5", "phases": ["prefill"]}},
    }
    reserve_rows(model, config_from_tree(tree), topology)
    # 100 tokens of 4 experts; 2 experts of 1.5 x 400 x 4 / 8 slots, and 40 decode tokens of both.
    assert reserved == [(4, 400, 680)]
    assert [each.row_limit for each in layers] == [None, None, None]


def test_rows_come_in_rounds_in_layers_that_exceed_their_own_limit_alone():
    def layer(top_k: int) -> Any:
        return SimpleNamespace(
            spec=SimpleNamespace(
                router=SimpleNamespace(top_k=top_k, num_experts=8), hidden=16, width=16, ffn=32
            ),
            instances=Instances(LayerPlacement.contiguous(8, 4), 4),
            on_device=SimpleNamespace(transport=None),
            row_limit=None,
        )

    layers = [layer(1), layer(8)]
    model: Any = SimpleNamespace(moe_layers=layers, dtype=torch.float32)
    topology: Any = SimpleNamespace(expert=SimpleNamespace(size=4), device=torch.device("cpu"))
    tree = {"model": {"path": "x"}, "scheduler": {"max_batch_tokens": 100}}
    reserve_rows(model, config_from_tree(tree), topology)
    # Of 400 tokens a rank gets at most 400 or 800 rows; the limits are 200 and 1,600.
    assert [each.row_limit for each in layers] == [200, None]


def test_of_layers_with_capacities_of_their_own_the_widest_decides():
    """A policy of two layers: the bounds of each by itself, and buffers that hold either."""
    reserved: list[tuple[int, int]] = []

    def layers() -> list[Any]:
        spec = SimpleNamespace(
            router=SimpleNamespace(top_k=2, num_experts=8), hidden=16, width=16, ffn=32
        )
        return [
            SimpleNamespace(
                layer=index,
                spec=spec,
                instances=Instances(LayerPlacement.contiguous(8, 4), 4),
                on_device=SimpleNamespace(transport=None),
                reserve=lambda sent, received, _: reserved.append((sent, received)) or 0,
                row_limit=None,
            )
            for index in range(3)
        ]

    def reserve(policy: Policy) -> list[int | None]:
        buffers = SimpleNamespace(num_bytes=0)
        model: Any = SimpleNamespace(moe_layers=layers(), dtype=torch.float32, row_buffers=buffers)
        topology: Any = SimpleNamespace(expert=SimpleNamespace(size=4), device=torch.device("cpu"))
        tree = {"model": {"path": "x"}, "scheduler": {"max_batch_tokens": 100, "max_sequences": 10}}
        reserve_rows(model, config_from_tree(tree), topology, policy)
        return [each.row_limit for each in model.moe_layers]

    low, high = (
        CapacityConfig(policy="token_drop", factor=factor, phases=("prefill", "decode"))
        for factor in ("1", "1.5")
    )
    # 400 tokens of 2 of 8 experts, 2 per rank: 200 and 300 slots, dropless 400 in rounds of 800/2.
    assert reserve(Policy(dict.fromkeys(range(3), low))) == [None, None, None]
    assert reserve(Policy(dict.fromkeys(range(3), high))) == [None, None, None]
    assert reserve(Policy({0: low, 1: high})) == [None, None, 400]
    assert reserve(Policy({0: low, 1: high, 2: low})) == [None, None, None]
    assert reserved == [(200, 200), (200, 300), (200, 400), (200, 300)]
    assert reserve(Policy({})) == [400, 400, 400]
    assert len(reserved) == 4, "without a limit the buffers grow with the steps"
