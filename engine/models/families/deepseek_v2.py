"""DeepSeek-V2 (arXiv 2405.04434) and V2-Lite.

Latent attention, dense first layers, ungated shared experts, group-limited routing.

`deepseek_spec` is shared with DeepSeek-V3 (`deepseek_v3.py`): the two differ in routing alone, as
far as they are run here.
"""

from __future__ import annotations

from typing import Any

from engine.layers.mla import MLASpec
from engine.layers.rotary import yarn_softmax_factor
from engine.models.config_fields import read, read_flag, read_optional
from engine.models.hf_config import model_spec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, SparseSpec
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers DeepseekV2Config into a `ModelSpec`.

    norm_topk_prob is false in every published V2 model; where it is true, DeepSeek's code and
    transformers disagree.

    Raises:
        ValueError: on that, and on a topk_method other than greedy and group_limited_greedy.
    """
    if read_flag(hf_config, "norm_topk_prob", False):
        raise ValueError(
            "norm_topk_prob: True in config.json is not supported for deepseek_v2: DeepSeek's own "
            "code normalises the weights then and transformers does not; set it to false, or to "
            "model_type deepseek_v3 if the model is one"
        )
    groups = {}
    method = read(hf_config, "topk_method")
    if method == "group_limited_greedy":
        groups = {
            "num_groups": read(hf_config, "n_group"),
            "top_groups": read(hf_config, "topk_group"),
        }
    elif method != "greedy":
        raise ValueError(
            f"topk_method: {method!r} in config.json is not a DeepSeek-V2 method; "
            "known: 'greedy', 'group_limited_greedy'"
        )
    router = RouterSpec(
        num_experts=read(hf_config, "n_routed_experts"),
        top_k=read(hf_config, "num_experts_per_tok"),
        scale=read(hf_config, "routed_scaling_factor"),
        float32_logits=True,
        **groups,
    )
    return deepseek_spec(
        hf_config, router, interleaved=True, mlp_bias=read_flag(hf_config, "mlp_bias", False)
    )


def deepseek_spec(
    hf_config: Any, router: RouterSpec, *, interleaved: bool, mlp_bias: bool = False
) -> ModelSpec:
    """Return the DeepSeek decoder with a given router.

    Args:
        interleaved: whether rotary pairs are neighbours, as in `MLASpec`.
        mlp_bias: whether the dense layers and shared experts have biases.
    """
    nope_dim, rope_dim = (read(hf_config, f"qk_{part}_head_dim") for part in ("nope", "rope"))
    hidden, ffn = read(hf_config, "hidden_size"), read(hf_config, "moe_intermediate_size")
    attention = MLASpec(
        hidden=hidden,
        num_heads=read(hf_config, "num_attention_heads"),
        q_rank=read_optional(hf_config, "q_lora_rank"),
        kv_rank=read(hf_config, "kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=read(hf_config, "v_head_dim"),
        scale=(nope_dim + rope_dim) ** -0.5 * yarn_softmax_factor(hf_config.rope_parameters),
        interleaved=interleaved,
        bias=read_flag(hf_config, "attention_bias", False),
    )
    num_shared = read_optional(hf_config, "n_shared_experts") or 0
    shared = DenseSpec(ffn=num_shared * ffn, bias=mlp_bias)
    sparse = SparseSpec(
        moe=MoESpec(router=router, hidden=hidden, ffn=ffn),
        shared=shared if num_shared else None,
    )
    layers = [
        LayerSpec(
            attention=attention,
            mlp=sparse
            if is_routed
            else DenseSpec(ffn=read(hf_config, "intermediate_size"), bias=mlp_bias),
        )
        for is_routed in _routed_layers(hf_config)
    ]
    # Layers past the last are multi-token prediction heads (V3, section 2.2), which plain decoding
    # does not use.
    return model_spec(hf_config, layers, rotary_dim=rope_dim, mtp_layers=True)


def _routed_layers(hf_config: Any) -> list[bool]:
    """Return for each layer whether it is routed.

    Published configurations have moe_layer_freq, a number or one entry per layer; transformers
    drops it, because it only repeats first_k_dense_replace.

    Raises:
        ValueError: naming moe_layer_freq where it is too short.
    """
    num_layers = read(hf_config, "num_hidden_layers")
    first = read(hf_config, "first_k_dense_replace")
    every = read_optional(hf_config, "moe_layer_freq") or 1
    if not isinstance(every, list):
        return [i >= first and i % every == 0 for i in range(num_layers)]
    if len(every) < num_layers:
        raise ValueError(
            f"moe_layer_freq: {every!r} in config.json must be a number or have one entry per "
            f"layer, {num_layers}; compare it with the published config.json"
        )
    return [i >= first and bool(every[i]) for i in range(num_layers)]
