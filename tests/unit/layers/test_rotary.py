"""Rotary tables against transformers. Run: python -m pytest tests/unit/layers/test_rotary.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.layers.rotary import RotaryTable, rope_frequencies, yarn_softmax_factor

CPU = torch.device("cpu")
LENGTH = 48
SCALED = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
}


def mixtral_config(rope_type: str, head_dim: int | None = 8, **more: Any) -> Any:
    from transformers import MixtralConfig

    parameters = {"rope_type": rope_type, "rope_theta": 10000.0} | SCALED.get(rope_type, {}) | more
    return MixtralConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=64,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("rope_type", SCALED)
def test_every_scaling_type_gives_the_angles_of_transformers(rope_type):
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    config = mixtral_config(rope_type)
    positions = torch.arange(LENGTH)
    expected = MixtralRotaryEmbedding(config)(torch.zeros(1), positions[None])
    table = RotaryTable(config, 8, LENGTH, CPU, torch.float32)
    for found, wanted in zip(table.rows(positions), expected, strict=True):
        torch.testing.assert_close(found, wanted[0], rtol=0, atol=1e-6)


def test_rows_follow_the_positions_and_hold_each_angle_twice():
    table = RotaryTable(mixtral_config("default"), 8, LENGTH, CPU, torch.float32)
    cos, sin = table.rows(torch.tensor([7, 0, 7]))
    assert cos.shape == sin.shape == (3, 8)
    assert torch.equal(cos[0], cos[2]) and cos[1].eq(1).all() and sin[1].eq(0).all()
    assert torch.equal(sin[:, :4], sin[:, 4:])
    assert cos[0, 0] == pytest.approx(torch.tensor(7.0).cos().item())


def test_a_head_dim_of_null_in_the_configuration_is_no_obstacle():
    # With longrope transformers does not even make such a configuration.
    for rope_type in ("default", "linear", "dynamic", "yarn", "llama3"):
        with_null, _ = rope_frequencies(mixtral_config(rope_type, head_dim=None), 8, LENGTH)
        written, _ = rope_frequencies(mixtral_config(rope_type), 8, LENGTH)
        assert torch.equal(with_null, written)


def test_longrope_takes_its_short_factors_only_within_the_original_context():
    config = mixtral_config("longrope")
    short, _ = rope_frequencies(config, 8, 16)
    long, _ = rope_frequencies(config, 8, 17)
    torch.testing.assert_close(short / long, torch.tensor([2.0, 3 / 1.1, 4 / 1.2, 5 / 1.3]))


def test_dynamic_scaling_stretches_only_past_the_context():
    config, plain = mixtral_config("dynamic"), mixtral_config("default")
    unscaled = rope_frequencies(plain, 8, 64)[0]
    torch.testing.assert_close(rope_frequencies(config, 8, 64)[0], unscaled)
    assert (rope_frequencies(config, 8, 128)[0][1:] < unscaled[1:]).all()


def test_the_softmax_factor_of_deepseek_v2_is_its_published_one():
    # factor 40, mscale_all_dim 0.707: (0.1 * 0.707 * ln 40 + 1)^2.
    parameters = {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    assert yarn_softmax_factor(parameters) == pytest.approx(1.5896, abs=1e-4)
    assert yarn_softmax_factor(parameters | {"mscale_all_dim": 0}) == 1.0
    assert yarn_softmax_factor({"rope_type": "default"}) == 1.0


def test_unknown_rotations_are_refused():
    config = mixtral_config("default")
    config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(ValueError, match=r"rope_type: 'spiral' .* default, dynamic, linear"):
        rope_frequencies(config, 8, LENGTH)


@pytest.mark.parametrize("rope_type", SCALED)
def test_the_rotated_part_of_a_head_has_the_frequencies_of_transformers(rope_type):
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    parameters = {"rope_type": rope_type, "rope_theta": 10000.0} | SCALED[rope_type]
    config = Glm4MoeConfig(head_dim=16, max_position_embeddings=LENGTH, rope_parameters=parameters)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    # longrope has its short factors up to the context of the checkpoint
    embedding = Glm4MoeRotaryEmbedding(config)
    frequencies, scaling = rope_frequencies(config, 8, 16 if rope_type == "longrope" else LENGTH)
    torch.testing.assert_close(frequencies, embedding.inv_freq)
    assert scaling == pytest.approx(embedding.attention_scaling)
