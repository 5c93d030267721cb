"""engine/generation/builder.py: what does not fit into memory is said by setting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig, MoEConfig
from engine.generation.builder import reserve_rows


def test_rows_that_do_not_fit_into_memory_name_max_batch_tokens():
    def reserve(sent: int, received: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    router = SimpleNamespace(top_k=2, num_experts=8)
    layer = SimpleNamespace(
        spec=SimpleNamespace(router=router, hidden=16, ffn=32),
        num_local_experts=4,
        reserve=reserve,
    )
    model: Any = SimpleNamespace(moe_layers=[layer], embedding_VD=torch.zeros(1))
    topology: Any = SimpleNamespace(expert=SimpleNamespace(size=2))
    moe = MoEConfig(capacity=CapacityConfig(policy="token_drop"))
    config = Config(model=ModelConfig(path="x"), moe=moe)
    with pytest.raises(ValueError, match=r"^scheduler\.max_batch_tokens = 2048: the rows .*lower"):
        reserve_rows(model, config, topology)
