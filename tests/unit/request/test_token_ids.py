"""Prompts of whole numbers are accepted, others refused.

Run: pytest tests/unit/request/test_token_ids.py
"""

from array import array
from collections import deque
from decimal import Decimal

import numpy as np
import pytest
import torch

from engine.request import Request


@pytest.mark.parametrize("prompt", [[], [3, -1], [1.0], [True], ["a"]])
def test_a_prompt_that_is_empty_or_no_token_ids_is_refused(prompt):
    with pytest.raises(ValueError, match="request 'r'.*(no tokens|must be a whole number)"):
        Request(index=0, id="r", prompt_token_ids=prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        np.array([3, 1]),
        np.array([3, 1], dtype=np.uint8),
        [np.int64(3), np.int32(1)],
        torch.tensor([3, 1]),
        [torch.tensor(3), torch.tensor(1)],
        array("i", [3, 1]),
        range(3, 0, -2),
        deque([3, 1]),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_of_numpy_torch_and_others_are_whole_numbers(prompt):
    ids = Request(index=0, id="r", prompt_token_ids=prompt).prompt_token_ids
    assert list(ids) == [3, 1] and all(type(token) is int for token in ids)


@pytest.mark.parametrize(
    "prompt",
    [
        np.array([3.0]),
        np.array([True]),
        np.array([[3, 1]]),
        np.array(3),
        torch.tensor([3.5]),
        torch.tensor([True]),
        torch.tensor([[3]]),
        [torch.tensor(True)],
        [np.bool_(True)],
        [np.float32(1)],
        [[3, 1]],
        [None],
        [Decimal(3)],
        "ab",
        b"ab",
        {3: 1},
        {3},
        5,
        None,
    ],
    ids=repr,
)
def test_what_is_no_row_of_token_ids_is_refused_in_words(prompt):
    with pytest.raises(ValueError, match=r"^request 'r': prompt_token_ids.* must be "):
        Request(index=0, id="r", prompt_token_ids=prompt)
