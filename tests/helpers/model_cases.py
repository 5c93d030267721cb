"""Tiny random checkpoints, one per feature, written by transformers, with its logits and tokens.

Every parameter is redrawn: with the library's initialisation norms are all ones, biases are zero
and logits nearly flat, so that many mistakes would not show.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PROMPT_LENGTHS = (5, 11, 1, 8)
NEW_TOKENS = 5

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LATENT = {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Case:
    """A transformers configuration, and the tensor-parallel sizes its heads allow."""

    family: str  # prefix of transformers' configuration class
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        import transformers

        settings = _SMALL | self.settings
        if "num_layers" in settings:  # LongCat-Flash, where num_hidden_layers is twice that
            del settings["num_hidden_layers"], settings["num_key_value_heads"]
        return getattr(transformers, f"{self.family}Config")(**settings)


def _mixtral(**settings: Any) -> Case:
    return Case("Mixtral", {"intermediate_size": 24, "num_local_experts": 4} | settings)


def _olmoe(**settings: Any) -> Case:
    common = {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
    return Case("Olmoe", common | settings)


def _qwen2(**settings: Any) -> Case:
    common = {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    return Case("Qwen2Moe", common | settings)


def _qwen3(**settings: Any) -> Case:
    common = {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    return Case("Qwen3Moe", common | settings)


def _deepseek_v2(**settings: Any) -> Case:
    common = _LATENT | {
        "q_lora_rank": None,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": None,
        "topk_group": None,
    }
    return Case("DeepseekV2", common | settings)


def _deepseek_v3(**settings: Any) -> Case:
    common = _LATENT | {
        "q_lora_rank": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
    }
    return Case("DeepseekV3", common | settings)


def _glm4(**settings: Any) -> Case:
    common = {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
    }
    return Case("Glm4Moe", common | settings)


def _minimax_m2(**settings: Any) -> Case:
    common = {
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "rotary_dim": 4,
    }
    return Case("MiniMaxM2", common | settings)


def _ernie(**settings: Any) -> Case:
    common = {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "num_key_value_heads": 2,
    }
    return Case("Ernie4_5_Moe", common | settings)


def _gpt_oss(**settings: Any) -> Case:
    common = {
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 4,
        "rope_parameters": _YARN | {"truncate": False, "factor": 32.0},
    }
    return Case("GptOss", common | settings)


def _longcat(**settings: Any) -> Case:
    common = {name: value for name, value in _LATENT.items() if "interm" not in name} | {
        "num_layers": 2,
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": 24,
        "q_lora_rank": 12,
        "head_dim": 4,
        "n_routed_experts": 6,
        "zero_expert_num": 3,
        "moe_topk": 3,
        "routed_scaling_factor": 1.5,
    }
    del common["num_experts_per_tok"]
    return Case("LongcatFlash", common | settings)


CASES = {
    "mixtral": _mixtral(),
    "mixtral-5-experts-top-1": _mixtral(
        num_local_experts=5, num_experts_per_tok=1, num_hidden_layers=1, vocab_size=101
    ),
    "mixtral-window-head-dim-tied": _mixtral(
        sliding_window=4, head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-3
    ),
    "mixtral-one-kv-head-linear-rope": _mixtral(
        num_key_value_heads=1,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "olmoe": _olmoe(),
    "olmoe-clip-bias-normalised-top-k-all": _olmoe(
        clip_qkv=0.8,
        attention_bias=True,
        norm_topk_prob=True,
        num_experts_per_tok=6,
        rms_norm_eps=1e-3,
    ),
    "qwen2-moe": _qwen2(num_key_value_heads=4),
    "qwen2-moe-mixed-layers-window": _qwen2(
        num_hidden_layers=4,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=3,
    ),
    "qwen2-moe-no-bias-5-experts": _qwen2(qkv_bias=False, num_experts=5, mlp_only_layers=[0]),
    "qwen3-moe": _qwen3(head_dim=16, norm_topk_prob=True),
    "qwen3-moe-bias-dense-layer-window-tied": _qwen3(
        head_dim=16,
        attention_bias=True,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=4,
        rms_norm_eps=1e-3,
    ),
    "qwen3-moe-llama3-rope": _qwen3(
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "deepseek-v2-lite": _deepseek_v2(
        routed_scaling_factor=1.7,
        rope_parameters=_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek-v2-groups-q-lora-biases": _deepseek_v2(
        q_lora_rank=12,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        num_experts_per_tok=3,
        routed_scaling_factor=16.0,
        attention_bias=True,
        mlp_bias=True,
        first_k_dense_replace=0,
        rope_parameters=_YARN,
    ),
    "deepseek-v2-direct-q-bias": _deepseek_v2(
        attention_bias=True, n_routed_experts=5, rms_norm_eps=1e-3
    ),
    "deepseek-v3": _deepseek_v3(
        rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, num_nextn_predict_layers=1
    ),
    "deepseek-v3-split-pairs-unnormalised": _deepseek_v3(
        rope_interleave=False, norm_topk_prob=False, n_group=1, topk_group=1
    ),
    "glm4-moe": _glm4(head_dim=8, attention_bias=True, num_nextn_predict_layers=1),
    "glm4-moe-groups-plain-heads-yarn-tied": _glm4(
        head_dim=16,
        use_qk_norm=False,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        first_k_dense_replace=0,
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
        rope_parameters=_YARN | {"partial_rotary_factor": 0.25},
    ),
    "minimax-m2": _minimax_m2(),
    "minimax-m2-whole-heads-one-kv-head-tied": _minimax_m2(
        head_dim=12,
        rotary_dim=12,
        num_key_value_heads=1,
        num_local_experts=5,
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
    ),
    "ernie4-5-moe": _ernie(),
    "ernie4-5-moe-interval-untied-no-shared": _ernie(
        num_hidden_layers=6,
        moe_num_experts=5,
        moe_k=3,
        moe_num_shared_experts=0,
        moe_layer_start_index=1,
        moe_layer_end_index=4,
        moe_layer_interval=2,
        moe_norm_min=0.7,
        tie_word_embeddings=False,
    ),
    "gpt-oss": _gpt_oss(),
    "gpt-oss-windows-first-5-experts-one-kv-head-tied": _gpt_oss(
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        sliding_window=3,
        num_key_value_heads=1,
        num_local_experts=5,
        num_experts_per_tok=5,
        attention_bias=False,
        swiglu_alpha=1.3,
        swiglu_limit=0.5,
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    ),
    "longcat-flash": _longcat(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "longcat-flash-biases-one-layer-no-zero-experts-yarn": _longcat(
        num_layers=1,
        attention_bias=True,
        n_routed_experts=5,
        zero_expert_num=0,
        rms_norm_eps=1e-3,
        tie_word_embeddings=True,
        rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    # head_dim is written out: without it transformers itself fails on these scaling types.
    "mixtral-dynamic-rope": _mixtral(
        head_dim=8, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mixtral-longrope": _mixtral(head_dim=8, rope_parameters=_LONGROPE),
    "olmoe-yarn": _olmoe(head_dim=8, rope_parameters=_YARN),
}

# What changes with the number of ranks, without every family feature twice.
SHARDED_CASES = (
    "mixtral",
    "mixtral-5-experts-top-1",
    "mixtral-one-kv-head-linear-rope",
    "olmoe-clip-bias-normalised-top-k-all",
    "qwen2-moe",
    "qwen3-moe-bias-dense-layer-window-tied",
    "deepseek-v2-lite",
    "deepseek-v2-groups-q-lora-biases",
    "deepseek-v3",
    "glm4-moe",
    "glm4-moe-groups-plain-heads-yarn-tied",
    "minimax-m2",
    "minimax-m2-whole-heads-one-kv-head-tied",
    "ernie4-5-moe",
    "ernie4-5-moe-interval-untied-no-shared",
    "gpt-oss",
    "gpt-oss-windows-first-5-experts-one-kv-head-tied",
    "longcat-flash",
)


@dataclass(frozen=True)
class Reference:
    """A checkpoint folder, sequences (prompt + greedy continuation), and transformers' logits.

    logits[i]: float32 [len(sequences[i]) - 1, V], of every position that has a successor.
    """

    path: Path
    sequences: list[list[int]]
    logits: list[torch.Tensor]


def make_reference(
    case: Case, path: Path, dtype: torch.dtype = torch.float32, **save: Any
) -> Reference:
    """Write the checkpoint under `path` and let transformers continue the prompts greedily.

    dtype: of the checkpoint; transformers computes in float32, on the weights as they are stored.
    """
    import transformers

    generator = torch.Generator().manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        case.config(), attn_implementation="eager"
    )
    redraw(model, generator)
    model.eval()
    if dtype != torch.float32:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(tensor.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(path, **save)
    sequences, logits = [], []
    for length in PROMPT_LENGTHS:
        tokens = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                # Without a cache: the reference is the whole sequence at once.
                out = model(tokens, use_cache=False).logits
                tokens = torch.cat((tokens, out[:, -1:].argmax(-1)), dim=1)
        sequences.append(tokens[0].tolist())
        logits.append(out[0].float())
    return Reference(path, sequences, logits)


def redraw(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Redraw every parameter and buffer of the checkpoint, so that each changes the logits."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith(("bias", "sinks")):
                tensor.copy_(0.3 * noise)
            elif name.endswith("embed_tokens.weight"):
                tensor.copy_(noise)
            else:
                tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)
