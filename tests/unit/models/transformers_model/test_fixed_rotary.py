"""Rotary embeddings whose frequencies follow from the length, chosen once.

Run: python -m pytest tests/unit/models/transformers_model/test_fixed_rotary.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.models.transformers_model.fixed_rotary import FixedRotary, fix_lengths
from engine.models.transformers_model.plug_in import ATTENTION
from engine.models.transformers_model.probe import build_on_meta
from tests.helpers.transformers_cases import FOREIGN_CASES

BY_LENGTH = ("granitemoe-dynamic", "phimoe-longrope", "exaone-moe-longrope")
CPU, KEPT = torch.device("cpu"), 64  # positions for which the first choice holds


def fixed(case: str, max_len: int) -> Any:
    model = build_on_meta(FOREIGN_CASES[case].config(), torch.float32, ATTENTION)
    fix_lengths(model, max_len, CPU, torch.float32)
    return model.model.rotary_emb


@pytest.mark.parametrize("max_len", [KEPT - 1, KEPT, KEPT + 1, 100])
@pytest.mark.parametrize("case", BY_LENGTH)
def test_every_position_is_as_in_a_sequence_of_the_longest_length(case: str, max_len: int) -> None:
    config = FOREIGN_CASES[case].config()
    theirs: Any = type(FOREIGN_CASES[case].model().model.rotary_emb)(config)
    wanted = theirs(torch.zeros(1), torch.arange(max_len)[None])
    positions_1T = torch.tensor([[3, 0, max_len - 1, 3, 17]])
    for made, whole in zip(fixed(case, max_len)(torch.zeros(1), positions_1T), wanted, strict=True):
        assert torch.equal(made[0], whole[0][positions_1T[0]])


@pytest.mark.parametrize("case", BY_LENGTH)
def test_the_choice_changes_past_the_length_up_to_which_it_holds(case: str) -> None:
    positions_1T = torch.arange(1, 9)[None]
    short, also_short, long = (
        fixed(case, max_len)(torch.zeros(1), positions_1T)[0] for max_len in (9, KEPT, KEPT + 9)
    )
    assert torch.equal(short, also_short) and not torch.equal(short, long)


def test_other_rotary_embeddings_are_left_to_transformers() -> None:
    assert not isinstance(fixed("granitemoe", 8), FixedRotary)
