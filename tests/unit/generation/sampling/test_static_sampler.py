"""Tokens chosen in static shapes are those of the sampler.

Run: pytest tests/unit/generation/sampling/test_static_sampler.py
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.sampling import sampler, static_sampler
from engine.generation.sampling.sampler import sample
from engine.generation.sampling.static_sampler import (
    NEEDS_ALL,
    NOT_FINITE,
    Draws,
    choose_tokens,
    draws_of,
    needs_host,
    sampling_table,
)
from engine.generation.sequence import Sequence
from engine.request import Request, SamplingParams

MANY = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 30]),
    top_p=st.sampled_from([1.0, 1.0, 0.37, 0.77, 0.96]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.4]),
    seed=st.integers(0, 2**40),
)


def chosen(logits: torch.Tensor, params: list[SamplingParams], least: Draws) -> list[int]:
    vocab, rows = logits.shape[1], range(len(params))
    table = torch.from_numpy(sampling_table(params, rows, [3 * row for row in rows], vocab))
    return choose_tokens(logits, table, max(least, draws_of(params, vocab))).tolist()


@given(st.data())
def test_every_row_has_the_token_of_the_sampler(data: st.DataObject) -> None:
    vocab, seed = data.draw(st.sampled_from([5, 40, 300])), data.draw(st.integers(0, 99))
    params = data.draw(st.lists(MANY, min_size=1, max_size=6))
    logits = 3 * torch.randn(
        len(params), vocab, generator=torch.Generator().manual_seed(seed)
    ).round(decimals=data.draw(st.sampled_from([0, 6])))  # with and without equal logits
    candidates, rows = data.draw(st.sampled_from([30, 60, 1024])), range(len(params))
    with pytest.MonkeyPatch.context() as patch:
        for module in (sampler, static_sampler):
            patch.setattr(module, "NUCLEUS_CANDIDATES", candidates)
        expected = sample(logits, params, rows, [3 * row for row in rows])[0]
        tokens = chosen(logits, params, data.draw(st.sampled_from(list(Draws))))
    is_nucleus = [not p.greedy and not 0 < p.top_k < vocab and p.top_p < 1 for p in params]
    for token, wanted, nucleus in zip(tokens, expected, is_nucleus, strict=True):
        assert token == wanted or (token == NEEDS_ALL and nucleus and candidates < vocab)


def test_a_top_p_that_more_tokens_have_to_be_sorted_for_is_left_to_the_sampler() -> None:
    nucleus = SamplingParams(temperature=1.0, top_p=0.9)
    params = [nucleus, SamplingParams(temperature=1.0, top_p=0.9, top_k=50), SamplingParams()]
    tokens = chosen(torch.zeros(3, 5000), params, Draws.GREEDY)
    assert tokens[0] == NEEDS_ALL and 0 <= tokens[1] < 50 and tokens[2] == 0
    peaked = torch.zeros(1, 5000)
    peaked[0, 4000:4003] = 20.0
    assert chosen(peaked, [nucleus], Draws.GREEDY)[0] in range(4000, 4003)


@pytest.mark.parametrize("least", Draws)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_token(least: Draws, bad: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    logits[2] = -math.inf
    tokens = chosen(logits, [SamplingParams(temperature=1.0)] * 3, least)
    assert tokens[0] >= 0 and tokens[1:] == [NOT_FINITE] * 2


def test_idle_rows_are_greedy_and_zeros_in_the_table() -> None:
    logits = torch.rand(2, 50)
    for draws in Draws:
        tokens = choose_tokens(logits, torch.zeros(5, 2, dtype=torch.float64), draws)
        assert tokens.tolist() == logits.argmax(1).tolist()


def test_what_a_step_asks_for_is_the_most_of_its_rows() -> None:
    plain, greedy = SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)
    wide = SamplingParams(temperature=1.0, top_k=100)
    assert draws_of([], 100) == draws_of([greedy], 100) == Draws.GREEDY
    assert draws_of([SamplingParams(temperature=1.0, top_k=1, top_p=0.5)], 100) == Draws.GREEDY
    assert draws_of([greedy, plain, wide], 100) == Draws.PLAIN
    assert draws_of([plain, wide], 101) == Draws.FILTERED
    assert draws_of([SamplingParams(temperature=1.0, top_p=0.5)], 100) == Draws.FILTERED


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 1024, "min_p": 0.1, "seed": 3}, False),
        ({"prompt_logprobs": True}, False),  # a prompt is not in a decode step
        ({"logprobs": True}, True),
        ({"logprobs": 3}, True),
        ({"logit_bias": {5: 1.0}}, True),
        ({"min_tokens": 1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"temperature": 1.0, "top_k": 1025}, True),
        ({"temperature": 0.0, "top_k": 1025}, False),
        ({"temperature": 1.0, "top_k": 5000}, False),  # of a vocabulary of 5000: off
    ],
)
def test_a_sequence_with_processors_on_the_host_leaves_the_graph(fields, expected) -> None:
    request = Request(index=0, id="0", prompt_token_ids=[1], params=SamplingParams(**fields))
    assert needs_host(Sequence(request), 5000) == expected
