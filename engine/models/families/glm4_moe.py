"""GLM-4.5 to 4.7 (arXiv 2508.06471): DeepSeek-V3's routing on grouped-query attention.

A part of each head is rotated; queries and keys are normalised head by head where use_qk_norm says
so; the first layers are dense; a shared expert without gate.
"""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read, read_flag, read_optional
from engine.models.families.deepseek_v3 import sigmoid_router
from engine.models.hf_config import attention_spec, model_spec, partial_rotary_dim
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, SparseSpec
from engine.moe.spec import MoESpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Glm4MoeConfig into a `ModelSpec`."""
    attention = attention_spec(
        hf_config,
        qkv_bias=read(hf_config, "attention_bias"),
        qk_norm="head" if read_flag(hf_config, "use_qk_norm", False) else "none",
    )
    ffn = read(hf_config, "moe_intermediate_size")
    num_shared = read_optional(hf_config, "n_shared_experts") or 0
    router = sigmoid_router(hf_config)
    sparse = SparseSpec(
        moe=MoESpec(router=router, hidden=read(hf_config, "hidden_size"), ffn=ffn),
        shared=DenseSpec(ffn=num_shared * ffn) if num_shared else None,
    )
    dense = DenseSpec(ffn=read(hf_config, "intermediate_size"))
    num_dense = read(hf_config, "first_k_dense_replace")
    layers = [
        LayerSpec(attention=attention, mlp=sparse if index >= num_dense else dense)
        for index in range(read(hf_config, "num_hidden_layers"))
    ]
    return model_spec(
        hf_config,
        layers,
        rotary_dim=partial_rotary_dim(hf_config, attention.head_dim),
        partial_rotary=True,
        mtp_layers=True,
    )
