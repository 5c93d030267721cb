"""Parameters of published models, in all and per token, against what their publishers say.

Run: pytest tests/unit/model_check/test_parameters.py
"""

from __future__ import annotations

import json

import pytest

from engine.model_check import report
from engine.model_check.text import lines_of
from tests.helpers import published_configs as published
from tests.helpers.sparse_checkpoint import deepseek_v3, mixtral_8x7b


@pytest.mark.parametrize(
    ("config", "total", "active", "all_rows"),
    [
        # In 1e9. Publishers count the embedding (Mixtral: 12.9, Qwen3: 3.3, Kimi-K2: 32 and
        # 1,000 in all) or do not (DeepSeek-V3: 37, GLM-4.5: 32, gpt-oss: 5.1).
        (mixtral_8x7b()[0], 46.703, 12.749, 12.880),
        (published.QWEN3_30B, 30.532, 3.042, 3.353),
        (deepseek_v3(fp8=True)[0], 671.026, 36.626, 37.552),
        (published.GLM_4_5, 352.798, 32.856, 33.632),
        (published.GPT_OSS_120B, 116.829, 5.133, 5.712),
        (published.KIMI_K2, 1026.408, 31.687, 32.861),
        (published.MINIMAX_M2, 228.690, 10.416, 11.031),
        (published.ERNIE_4_5_21B, 21.825, 3.352, 3.352),  # the embedding is the head
        (published.QWEN15_MOE, 14.316, 2.378, 2.689),
        (published.DEEPSEEK_V2_LITE, 15.706, 2.451, 2.661),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_a_token_uses_its_experts_and_one_row_of_the_embedding(
    tmp_path, config, total, active, all_rows
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = report.check(tmp_path, (8,), 1, "auto", (79.0,))
    names = ["total", "active", "active_with_embedding"]
    assert list(found["parameters"]) == [*names, "parts"]
    counts = [found["parameters"][name] / 1e9 for name in names]
    assert counts == pytest.approx([total, active, all_rows], abs=0.001)
    text = "\n".join(lines_of(found))
    told = "the embedding is the head" if active == all_rows else f"{all_rows:.1f}B with all rows"
    assert f"{active:.1f}B active per token (" in text and told in text


def test_the_biases_of_experts_that_a_token_does_not_choose_are_not_counted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published.GPT_OSS_120B))
    counts = report.check(tmp_path, (8,), 1, "auto", (79.0,))["parameters"]
    expert = 3 * 2880 * 2880 + 3 * 2880
    embedding = 201088 * 2880
    assert counts["total"] - counts["active_with_embedding"] == 36 * 124 * expert
    assert counts["active_with_embedding"] - counts["active"] == embedding - 2880
