"""Write a trained tiny model as a Hugging Face checkpoint and measure what was written.

Last stage of tools/train_tiny.py. Weights are stored in bfloat16; every figure is taken after
loading them back in float32 with transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny.arch import TinyArch
from tiny.corpus import BOS_ID, EOS_ID, PAD_ID
from tiny.model import TinyMoe
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

MAX_RELATIVE_ERROR = 1e-4


def hugging_face_config(arch: TinyArch) -> PretrainedConfig:
    """Return the family's own configuration class with this model's sizes."""
    shared = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.expert_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "num_experts_per_tok": arch.top_k,
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if arch.model_type == "mixtral":
        return MixtralConfig(num_local_experts=arch.num_experts, **shared)
    return OlmoeConfig(num_experts=arch.num_experts, norm_topk_prob=arch.norm_topk_prob, **shared)


def save_checkpoint(model: TinyMoe, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save weights (bfloat16), configuration, generation defaults and tokenizer under `out`."""
    config = hugging_face_config(model.arch)
    family = MixtralForCausalLM if model.arch.model_type == "mixtral" else OlmoeForCausalLM
    exported = family(config)  # type: ignore[arg-type]
    exported.load_state_dict(model.state_dict())
    exported.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    exported.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    exported.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # What readers older than transformers 5 look for: rope_theta at the top level, a known class.
    _set_fields(out / "config.json", rope_theta=model.arch.rope_theta)
    _set_fields(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (out / "model.safetensors").chmod(0o644)


def _set_fields(path: Path, **fields: object) -> None:
    merged = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


def load_checkpoint(path: Path) -> torch.nn.Module:
    """Load the stored weights with transformers, in float32, ready to evaluate."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits_error(model: TinyMoe, exported: torch.nn.Module, ids_BS: torch.Tensor) -> float:
    """Return largest difference of the two models' logits over the largest logit, both in float32.

    `model` is left holding the exported model's (rounded) weights. Raises ValueError at
    MAX_RELATIVE_ERROR or more: the training module has then left the family's definition.
    """
    model.load_state_dict(exported.state_dict())
    ours, theirs = model(ids_BS)[0], exported(ids_BS).logits
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if error >= MAX_RELATIVE_ERROR:
        raise ValueError(
            f"{model.arch.model_type}: exported logits differ by {error:.1e} (rule: below "
            f"{MAX_RELATIVE_ERROR:.0e}); compare tiny/model.py with transformers' modeling file"
        )
    return error


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
