"""Megatron-Core on CPU, for tests: routers and whole MoE layers with Lockstep's capacity.

Megatron-Core takes seconds to import, so nothing here does before a function is called.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

from engine.config import CapacityConfig
from engine.interop.megatron import capacity_router

HIDDEN = 8
GROUPS = ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp", "tp_ep")

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None
    or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed (pip install 'megatron-core>=0.16,<0.20')",
)


def transformer_config(num_experts: int, top_k: int, **settings: Any) -> Any:
    """A TransformerConfig of one MoE layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.transformer_config import TransformerConfig

        return TransformerConfig(
            **{
                "num_layers": 1,
                "hidden_size": HIDDEN,
                "num_attention_heads": 1,
                "num_moe_experts": num_experts,
                "moe_router_topk": top_k,
                "moe_ffn_hidden_size": 12,
                "moe_token_dispatcher_type": "alltoall",
                "moe_expert_capacity_factor": float(num_experts),  # drops none; see check_settings
                "add_bias_linear": False,
                **settings,
            }
        )


def groups(**given: Any) -> Any:
    """A ProcessGroupCollection; groups that are not given are of one rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection(**{**dict.fromkeys(GROUPS), **given})


def make_router(config: Any, capacity: CapacityConfig | None, layer: int = 1, **given: Any) -> Any:
    """Build Megatron's own router, or one with this capacity."""
    from megatron.core.transformer.moe.router import TopKRouter

    build = TopKRouter if capacity is None else capacity_router(capacity)
    router = build(config=config, pg_collection=groups(**given))
    router.set_layer_number(layer)
    return router.eval()


def random_logits(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """[T, 1, E] of few different values, so that there are ties; lower experts look better."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 5, (num_tokens, 1, num_experts), generator=generator) / 2
    return logits + torch.linspace(1.5, 0, num_experts)


def logits_of(scores: list[list[float]]) -> torch.Tensor:
    """Logits [T, 1, E] whose softmax is these scores, each row of which sums to 1."""
    return torch.tensor(scores).log()[:, None]


class _Stream:
    """Substitute for a CUDA stream on CPU: all work is complete at once."""

    def wait_stream(self, other: Any) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


def _gate(x: torch.Tensor, weight: torch.Tensor, bias: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype))


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


@contextlib.contextmanager
def no_cuda():
    """Patch what Megatron's layers need CUDA for: streams, splits of a CUDA tensor, and the
    Transformer Engine of the gate.
    """
    stream = _Stream()
    with (
        mock.patch("megatron.core.transformer.moe.router.router_gating_linear", _gate),
        mock.patch(
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", _to_host
        ),
        mock.patch("torch.cuda.Stream", lambda *_: stream),
        mock.patch("torch.cuda.current_stream", lambda *_: stream),
        mock.patch("torch.cuda.stream", lambda _: contextlib.nullcontext()),
        mock.patch("torch.cuda.current_device", lambda: torch.device("cpu")),
    ):
        yield


def make_layer(config: Any, router: Any, pg_collection: Any) -> Any:
    """Build a MoELayer of Megatron's own sequential experts; router: builds its router."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=mlp)
    layer = MoELayer(
        config, MoESubmodules(experts=experts, router=router), pg_collection=pg_collection
    )
    layer.set_layer_number(1)
    return layer.eval()
