"""Decode steps in buffers of fixed shape have what the runner would build of them.

Run: pytest tests/unit/generation/test_decode_step.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.generation.decode_step import fill_inputs, has_fixed_shape
from engine.generation.runner import Runner
from engine.generation.sampling.sampler import sample
from engine.generation.sampling.static_sampler import Draws, choose_tokens
from engine.generation.sequence import Sequence
from engine.generation.step import Slice, Step
from engine.layers.decode_inputs import DecodeInputs
from engine.request import Request, SamplingParams

SIZE, VOCAB, CPU = 4, 50, torch.device("cpu")
DRAWN = SamplingParams(temperature=1.0, top_p=0.8, seed=4)


def piece(index: int, tokens: int, params: SamplingParams, length: int = 1) -> Slice:
    """The last tokens of a sequence of so many."""
    prompt = [(7 * index + each) % VOCAB for each in range(tokens - 1 if length == 1 else tokens)]
    seq = Sequence(Request(index=index, id=str(index), prompt_token_ids=prompt, params=params))
    if length == 1:
        seq.token_ids.append(index)
    seq.block_ids = [10 * index + each for each in range(-(-tokens // SIZE) + 1)]
    seq.state_row = index
    return Slice(seq, tokens - length, length, True)


def runner(has_states: bool) -> Runner:
    cache: Any = SimpleNamespace(block_size=SIZE, spec=SimpleNamespace(has_states=has_states))
    return Runner(SimpleNamespace(), cache, CPU)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("has_states", [False, True])
@pytest.mark.parametrize("lengths", [[], [2], [4, 5], [9, 2, 8], [13, 12, 16, 3]])
def test_rows_in_use_are_those_that_the_runner_builds(lengths: list[int], has_states: bool) -> None:
    slices = [piece(index, tokens, SamplingParams()) for index, tokens in enumerate(lengths)]
    inputs = DecodeInputs(4, 6, SIZE, CPU, 4000, 77 if has_states else None)
    assert fill_inputs(inputs, slices, VOCAB) is Draws.GREEDY
    step, built, used = inputs.step, runner(has_states).build(slices), len(lengths)
    assert built.read is None
    pairs = [
        (step.token_ids_T, built.token_ids_T),
        (step.positions_T, built.positions_T),
        (step.slots_T, built.slots_T),
        (step.queries.context_lens_S, built.queries.context_lens_S),
        (step.queries.states_S, built.queries.states_S),
    ]
    for static, eager in pairs:
        assert (static is None) == (eager is None)
        if static is not None and eager is not None:
            assert static.dtype == eager.dtype and static[:used].tolist() == eager.tolist()
    assert step.queries.query_start_S1[: used + 1].tolist() == built.queries.query_start_S1.tolist()
    for row, tokens in enumerate(lengths):
        blocks = -(-tokens // SIZE)
        table = built.queries.block_table_SB[row, :blocks].tolist()
        assert step.queries.block_table_SB[row, :blocks].tolist() == table


def test_tokens_of_the_buffers_are_those_of_the_sampler() -> None:
    params = [DRAWN, SamplingParams(), SamplingParams(temperature=0.7, seed=2)]
    slices = [piece(index, 5 + index, each) for index, each in enumerate(params)]
    inputs = DecodeInputs(4, 6, SIZE, CPU, 4000)
    assert fill_inputs(inputs, slices, VOCAB) is Draws.FILTERED
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = sample(logits[:3], params, [5, 6, 7], [each.seq.request.key for each in slices])[0]
    assert choose_tokens(logits, inputs.sampling_5B, Draws.FILTERED).tolist()[:3] == expected


def test_only_decodes_that_need_nothing_of_the_host_have_the_shape() -> None:
    decodes = [piece(0, 5, DRAWN), piece(1, 6, SamplingParams())]
    assert has_fixed_shape(Step.of(decodes, 2), VOCAB)
    assert has_fixed_shape(Step.of([], 0), VOCAB)
    prefill = piece(2, 6, SamplingParams(), length=6)
    assert not has_fixed_shape(Step.of([*decodes, prefill], 2), VOCAB)
    biased = piece(3, 5, SamplingParams(logit_bias={1: 2.0}))
    assert not has_fixed_shape(Step.of([*decodes, biased], 3), VOCAB)
