"""What models that transformers builds are refused for: by name, before weights are read.

Every folder here holds a config.json and nothing else.

    python -m pytest tests/models/test_transformers_refusals.py
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import Config, DispatchConfig, ModelConfig, MoEConfig, OverlapConfig
from engine.model_check.rank_share import topology_on_meta
from engine.models.registry import build_model, read_config
from engine.models.transformers_model.plug_in import MaskRule
from engine.models.transformers_model.spec import _probed
from tests.helpers.transformers_cases import FOREIGN_CASES

ROOT = Path(__file__).parents[2]
_CASE = "dots1"
_KINDS = "layer_types in config.json: layers of the kinds {} are not served, only full_attention"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent states of Mamba layers": ("jamba", {}, _KINDS.format("linear_attention")),
    "recurrent states of delta layers": ("kimi_linear", {}, _KINDS.format("linear_attention")),
    "convolution states": (
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention"] * 16},
        _KINDS.format("conv"),
    ),
    "sparse attention with an indexer": (
        "deepseek_v32",
        {},
        _KINDS.format("indexed_attention"),
    ),
    "compressed sparse attention": (
        "deepseek_v4",
        {},
        _KINDS.format("compressed_sparse_attention, heavily_compressed_attention"),
    ),
    "an encoder and a decoder": (
        "switch_transformers",
        {},
        "is_encoder_decoder = true in config.json: encoders are not served",
    ),
    "encoders of images and sound": (
        "inkling_mm_model",
        {},
        "config.json has the parts audio_config, text_config, vision_config: encoders of images",
    ),
    "experts outside the experts interface": (
        "jetmoe",
        {},
        "transformers' JetMoeForCausalLM has no experts that this engine can replace",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_needs_is_refused_with_the_field_and_what_to_use_instead(
    case: str, tmp_path: Path
) -> None:
    model_type, settings, said = REFUSED[case]
    transformers.CONFIG_MAPPING[model_type](**settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot run") as raised:
        read_config(tmp_path)
    text = str(raised.value)
    assert text.startswith(f"model.path = {str(tmp_path)!r}: config.json has model_type = ")
    assert said in text and "use a checkpoint of one of mixtral" in text and "\n" not in text


def _next_too(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query + 1


def _every_other(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (key <= query) & ((query - key) % 2 == 0)


def _growing(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (key <= query) & (key * 2 >= query)


@pytest.mark.parametrize("rule", [_next_too, _every_other, _growing])
def test_a_mask_that_is_neither_causal_nor_a_window_is_refused_by_layer(
    rule: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FOREIGN_CASES[_CASE].config().save_pretrained(tmp_path)
    modeling = importlib.import_module("transformers.models.dots1.modeling_dots1")
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(modeling, name, lambda *_, **__: MaskRule(rule))
    _probed.cache_clear()
    with pytest.raises(ValueError, match="layer 0 attends with a mask that is neither causal nor"):
        read_config(tmp_path)
    _probed.cache_clear()


@pytest.mark.parametrize(
    ("tensor", "moe", "said"),
    [
        (2, MoEConfig(), "parallel.tensor = 2: must be 1 where transformers builds the model"),
        (
            1,
            MoEConfig(overlap=OverlapConfig(two_batch=True)),
            "moe.overlap.two_batch = True: must be false where transformers builds the model",
        ),
        (
            1,
            MoEConfig(shared_expert="balanced", dispatch=DispatchConfig(partial_sums=True)),
            "moe.shared_expert = balanced: must be replicated where transformers builds the model",
        ),
    ],
    ids=["tensor", "two-batch", "balanced"],
)
def test_a_setting_that_transformers_modules_do_not_honour_is_refused_on_every_rank(
    tensor: int, moe: MoEConfig, said: str, tmp_path: Path
) -> None:
    FOREIGN_CASES[_CASE].config().save_pretrained(tmp_path)
    config = Config(model=ModelConfig(path=str(tmp_path), max_model_len=16), moe=moe)
    topology = topology_on_meta(2, tensor)
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        build_model(read_config(tmp_path), config, topology, topology.device, torch.float32)
    assert "model.implementation" in str(raised.value)


@pytest.mark.long
def test_two_ranks_end_with_one_sentence_and_without_reading_weights(tmp_path: Path) -> None:
    values = transformers.CONFIG_MAPPING["jamba"]().to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "jamba"}))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")  # reading it would fail
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    infer = ["--nproc-per-node", "2", str(ROOT / "launch" / "infer.py")]
    settings = ["--config", "tiny_mixtral_ep2", "--set", f"model.path={tmp_path}"]
    tokenizer = ["--set", f"model.tokenizer={ROOT / 'configs/checkpoints/tiny_mixtral'}"]
    done = subprocess.run(
        [*torchrun, *infer, *settings, *tokenizer],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    found = re.findall(r"^error: .*linear_attention are not served", done.stderr, re.MULTILINE)
    assert len(found) == 1 and "model_type = 'jamba'" in found[0], done.stderr
    assert "exitcode  : 2" in done.stderr and "safetensors" not in found[0]
