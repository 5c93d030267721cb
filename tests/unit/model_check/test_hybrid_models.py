"""What the model check says of a model with recurrent states that is published to see images.

Run: pytest tests/unit/model_check/test_hybrid_models.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import SchedulerConfig
from engine.model_check import report
from engine.model_check.text import lines_of
from tests.helpers.sparse_checkpoint import qwen3_5_35b, write_sparse


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_sparse(tmp_path_factory.mktemp("qwen3.5"), *qwen3_5_35b(), shards=3)
    return report.check(folder, (1, 4), 1, "auto", (79.0, 139.0))


def test_the_language_model_runs_with_its_published_size(found: dict[str, Any]) -> None:
    assert found["runs"] and not found["problems"], found["problems"]
    assert found["parameters"]["total"] / 1e9 == pytest.approx(34.7, abs=0.05)
    assert found["stored"]["ignored"] == 2 and not found["stored"]["unused"]
    assert any("images and videos are not read" in remark for remark in found["remarks"])
    assert "note: the checkpoint is a qwen3_5_moe" in "\n".join(lines_of(found))


def test_keys_are_those_of_attention_layers_and_states_are_per_sequence(
    found: dict[str, Any],
) -> None:
    whole = found["ranks"][0]
    assert whole["kv_bytes_per_token"] == 10 * 2 * 2 * 256 * 2
    conv, delta = 3 * (2 * 2048 + 4096) * 2, 32 * 128 * 128 * 4
    assert whole["state_bytes_per_sequence"] == 30 * (conv + delta)
    assert whole["bytes"]["total"] == whole["stored_bytes"]
    text = "\n".join(lines_of(found))
    assert "KV cache 20.0 KiB per token (10.0 with scheduler.kv_dtype = fp8)" in text
    assert ", states 61.4 MiB per sequence" in text
    assert "gated DeltaNet in 30 of 40 layers: a recurrent state per sequence" in text
    assert "GQA: 16 heads, 2 key/value heads of 256" in text


def test_states_of_all_sequences_come_before_the_cache(found: dict[str, Any]) -> None:
    row = found["ranks"][1]
    tokens = row["kv_tokens"]
    per_gib = (tokens["139"] - tokens["79"]) / 60
    missing = (79 - row["bytes"]["total"] / 2**30) * per_gib - tokens["79"]
    sequences = SchedulerConfig().max_sequences
    states = sequences * row["state_bytes_per_sequence"] / row["kv_bytes_per_token"]
    assert missing > states > 100_000


def test_tensor_ranks_share_the_states(tmp_path: Path) -> None:
    folder = write_sparse(tmp_path, *qwen3_5_35b())
    (two,) = report.check(folder, (2,), 2, "auto", (79.0,))["ranks"]
    assert two["state_bytes_per_sequence"] == 15 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)
    refused = report.check(folder, (3,), 3, "auto", (79.0,))["problems"]
    assert any("parallel.tensor = 3" in problem for problem in refused)
