"""LongCat-Flash (arXiv 2509.01322): zero experts, and an MoE beside two dense layers.

A layer of the checkpoint is two decoder layers here: the MoE has the input of the first one's dense
MLP, and its output is added behind the second one's.
"""

from __future__ import annotations

from typing import Any

from engine.layers.mla import MLASpec
from engine.layers.rotary import yarn_softmax_factor
from engine.models.config_fields import read, read_flag, read_optional
from engine.models.hf_config import model_spec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec

# What the published models' own code could do otherwise, and transformers does in this way alone.
_ONLY = {
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "router_bias": False,
    "norm_topk_prob": False,
    "zero_expert_type": "identity",
}


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers LongcatFlashConfig into a `ModelSpec`.

    Raises:
        ValueError: on a setting that no published model has.
    """
    for name, only in _ONLY.items():
        value = read_optional(hf_config, name)
        if value is not None and value != only:
            raise ValueError(
                f"{name}: {value!r} in config.json is not supported for longcat_flash, only "
                f"{only!r}, as in every published LongCat-Flash"
            )
    hidden, rope_dim = read(hf_config, "hidden_size"), read(hf_config, "qk_rope_head_dim")
    num_experts = read(hf_config, "n_routed_experts")
    num_zero = read_optional(hf_config, "zero_expert_num") or 0
    router = RouterSpec(
        num_experts=num_experts,
        top_k=read(hf_config, "moe_topk"),
        scale=read(hf_config, "routed_scaling_factor"),
        correction_bias=True,
        float32_logits=True,
        num_zero_experts=num_zero,
    )
    attention, dense = _attention(hf_config), DenseSpec(ffn=read(hf_config, "ffn_hidden_size"))
    moe = MoESpec(router=router, hidden=hidden, ffn=read(hf_config, "expert_ffn_hidden_size"))
    pair = (
        LayerSpec(attention=attention, mlp=SparseSpec(moe=moe), parallel_dense=dense),
        LayerSpec(attention=attention, mlp=dense),
    )
    # Transformers has weights for the zero experts too, in one tensor with the others', and saves
    # them; nothing is computed with them.
    zero = "|".join(map(str, range(num_experts, num_experts + num_zero)))
    return model_spec(
        hf_config,
        pair * read(hf_config, "num_layers"),
        rotary_dim=rope_dim,
        names=MoENames(gate="router.classifier", bias="router.e_score_correction_bias"),
        sublayers=2,
        ignored=(r"^model\.mtp\.", *([rf"\.mlp\.experts\.({zero})\."] if zero else ())),
    )


def _attention(hf_config: Any) -> MLASpec:
    """Return the latent attention, whose latents are multiplied by the root of what they lack of
    the model dim.
    """
    hidden, rope_dim = read(hf_config, "hidden_size"), read(hf_config, "qk_rope_head_dim")
    nope_dim = read(hf_config, "qk_nope_head_dim")
    q_rank, kv_rank = read(hf_config, "q_lora_rank"), read(hf_config, "kv_lora_rank")
    scale = (nope_dim + rope_dim) ** -0.5 * yarn_softmax_factor(hf_config.rope_parameters)
    return MLASpec(
        hidden=hidden,
        num_heads=read(hf_config, "num_attention_heads"),
        q_rank=q_rank,
        kv_rank=kv_rank,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=read(hf_config, "v_head_dim"),
        scale=scale * (hidden / q_rank) ** 0.5,
        latent_scale=(hidden / kv_rank) ** 0.5,
        bias=read_flag(hf_config, "attention_bias", False),
    )
