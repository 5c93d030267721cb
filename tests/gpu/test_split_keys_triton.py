"""Attention over split keys in Triton: the reference's numbers, whatever else a step holds.

On a CUDA device, else in Triton's interpreter.
"""

import pytest
import torch

from engine.ops.paged_attention import paged_attention_reference
from tests.helpers.ops_cases import PagedCase, paged_case
from tests.helpers.triton_cases import DEVICE, kernel

pytestmark = kernel
STEP = [(1, 200), (1, 64), (1, 65), (1, 3), (1, 128), (9, 150)]


@pytest.fixture(autouse=True)
def few_keys(monkeypatch):
    from engine.ops.gpu import paged_attention

    monkeypatch.setattr(paged_attention, "SPLIT_KEYS", 64)


def attend(case: PagedCase, sinks_H: torch.Tensor | None = None, **masks) -> torch.Tensor:
    from engine.ops.gpu.paged_attention import paged_attention_triton

    on = [x.to(DEVICE) for x in case.tensors]
    sinks_H = None if sinks_H is None else sinks_H.to(DEVICE)
    return paged_attention_triton(*on, **case.lens, scale=0.2, sinks_H=sinks_H, **masks).cpu()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {"window": None},
        {"window": 70},
        {"window": 5},
        {"window": None, "chunk": 50},
    ],
    ids=str,
)
def test_parts_merge_to_the_reference(masks, sinks):
    case = paged_case(STEP, heads=4, kv_heads=2, key_dim=24, value_dim=24)
    sinks_H = torch.tensor([0.5, -3.0, 200.0, 2.0]) if sinks else None
    expected = paged_attention_reference(
        *case.tensors, **case.lens, scale=0.2, sinks_H=sinks_H, **masks
    )
    torch.testing.assert_close(attend(case, sinks_H, **masks), expected, rtol=2e-5, atol=2e-5)


def test_latents_merge_to_the_reference():
    case = paged_case([(1, 100), (1, 20), (3, 90)], heads=20, kv_heads=1, key_dim=264)
    case.v_cache = case.k_cache[..., :256]
    expected = paged_attention_reference(*case.tensors, **case.lens, scale=0.2, window=None)
    torch.testing.assert_close(attend(case, window=None), expected, rtol=2e-5, atol=2e-5)


def test_a_decode_gives_the_same_bits_alone_and_beside_longer_ones():
    case = paged_case(STEP, heads=4, kv_heads=2, key_dim=16, value_dim=16)
    whole = attend(case, window=None)
    for sequence in range(5):  # the fourth alone is not split at all
        alone = case.only(sequence)
        blocks = -(-alone.context_lens[0] // 16)
        alone.block_table_SB = alone.block_table_SB[:, :blocks].contiguous()
        assert torch.equal(attend(alone, window=None)[0], whole[sequence])
