"""MiniMax-M2 to M2.7: every layer routed, no shared expert, norms over whole projections.

Sigmoid scores with a correction bias choose the experts; a part of each head is rotated.
"""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read, read_optional
from engine.models.hf_config import attention_spec, model_spec, partial_rotary_dim
from engine.models.spec import LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec

# Fields of the published config.json that transformers does not read: what it runs is this.
_ONLY = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers MiniMaxM2Config into a `ModelSpec`.

    Raises:
        ValueError: on a field by which the model would be another one.
    """
    for name, only in _ONLY.items():
        value = getattr(hf_config, name, None)
        if value is not None and value != only:
            raise ValueError(
                f"{name}: {value!r} in config.json is not supported for minimax_m2, only {only!r}; "
                "compare it with the published config.json"
            )
    kinds = read_optional(hf_config, "attn_type_list") or ()
    if any(kind != 1 for kind in kinds):
        raise ValueError(
            f"attn_type_list: {kinds!r} in config.json is not supported, only 1 for every layer: "
            "MiniMax-M2 has full attention alone; compare it with the published config.json"
        )
    attention = attention_spec(hf_config, qk_norm="projection")
    router = RouterSpec(
        num_experts=read(hf_config, "num_local_experts"),
        top_k=read(hf_config, "num_experts_per_tok"),
        score="sigmoid",
        normalize=True,
        correction_bias=True,
    )
    hidden, ffn = read(hf_config, "hidden_size"), read(hf_config, "intermediate_size")
    layer = LayerSpec(
        attention=attention, mlp=SparseSpec(moe=MoESpec(router=router, hidden=hidden, ffn=ffn))
    )
    names = MoENames(
        block="block_sparse_moe", w1="w1", w3="w3", w2="w2", bias="e_score_correction_bias"
    )
    return model_spec(
        hf_config,
        [layer] * read(hf_config, "num_hidden_layers"),
        rotary_dim=partial_rotary_dim(hf_config, attention.head_dim),
        partial_rotary=True,
        names=names,
    )
