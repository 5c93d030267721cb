"""Bias, minimum length and penalties against a slow reference and transformers' processors.

Run: pytest tests/unit/generation/sampling/test_logit_adjustments.py
"""

import math
import random

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from engine.generation.sampling.logit_adjustments import History, TokenCounts, adjust
from engine.generation.sampling.sampler import sample_rows
from engine.request import SamplingParams

VOCAB = 23


def history(params: SamplingParams, tokens: list[int], num_prompt: int, stop_ids=()):
    return History.of(params, tokens, num_prompt, stop_ids)


def reference(logits, params, tokens, num_prompt, stop_ids) -> list[float]:
    """Adjust one row token by token."""
    out = list(logits)
    output = tokens[num_prompt:]
    for token, bias in params.logit_bias.items():
        out[token] += bias
    for token in stop_ids if len(output) < params.min_tokens else ():
        out[token] = -math.inf
    for token in set(tokens):
        penalty = params.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in set(output):
        out[token] -= params.frequency_penalty * output.count(token)
        out[token] -= params.presence_penalty
    return out


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.5, -1.0]),
        presence_penalty=rng.choice([0.0, 0.0, 0.25, 2.0]),
        logit_bias=rng.choice([{}, {3: -100.0, 4: 5.5}, {"22": 1.0}]),
        min_tokens=rng.choice([0, 0, 4]),
    )


def test_every_mix_of_rows_gets_the_logits_of_the_reference():
    rng = random.Random(0)
    for _ in range(30):
        size = rng.randrange(1, 8)
        logits = torch.randn(
            size, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(99))
        )
        params = [random_params(rng) for _ in range(size)]
        tokens = [[rng.randrange(VOCAB) for _ in range(rng.randrange(3, 12))] for _ in range(size)]
        rows = [history(p, t, 3, (0, 9)) for p, t in zip(params, tokens, strict=True)]
        expected = [
            reference(row, p, t, 3, (0, 9))
            for row, p, t in zip(logits.tolist(), params, tokens, strict=True)
        ]
        adjust(logits, rows)
        torch.testing.assert_close(logits, torch.tensor(expected))


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    tokens = [4, 4, 7, 1, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), logits.clone())
    adjust(logits, [history(SamplingParams(repetition_penalty=1.7), tokens, 3)])
    assert torch.equal(logits, expected)


def test_min_p_keeps_the_tokens_that_transformers_keeps():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    kept = MinPLogitsWarper(0.2)(torch.zeros(1, 1, dtype=torch.long), logits.clone()).isfinite()[0]
    params = SamplingParams(temperature=1.0, min_p=0.2)
    rows = logits.expand(4000, -1).contiguous()
    drawn = sample_rows(rows, [params] * 4000, range(4000), [0] * 4000).tokens
    assert set(drawn) == set(kept.nonzero()[:, 0].tolist())


def test_a_row_without_adjustments_keeps_its_bits_and_has_no_history():
    assert history(SamplingParams(temperature=1.0, min_p=0.3), [1], 1) is None
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    adjust(logits, [None, history(SamplingParams(frequency_penalty=1.0), [5, 5], 1)])
    assert torch.equal(logits[0], before[0])
    assert (logits[1] != before[1]).nonzero().tolist() == [[5]]


def test_stops_are_forbidden_until_there_are_enough_tokens_also_ids_outside_of_the_vocabulary():
    params = SamplingParams(min_tokens=2)
    tokens = [1, 2]
    row = history(params, tokens, 2, (3, VOCAB + 5))
    picked = []
    for _ in range(3):
        logits = torch.zeros(1, VOCAB)
        logits[0, 3] = 9.0
        picked += sample_rows(logits, [params], [0], [0], None, [row]).tokens
        tokens.append(picked[-1])
    assert picked == [0, 0, 3]


def test_logprobs_are_of_the_logits_before_any_adjustment():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(logit_bias={7: 100.0}, logprobs=1)
    exact = logits.double().log_softmax(1)[0]
    sampled = sample_rows(logits, [params], [0], [0], None, [history(params, [1], 1)])
    assert sampled.tokens == [7]
    assert sampled.logprobs == [pytest.approx(exact[7].item(), abs=1e-6)]
    assert sampled.top is not None
    assert sampled.top[0][0][0] == int(exact.argmax())


def test_a_token_does_not_depend_on_the_rows_beside_it():
    rng = random.Random(4)
    size = 12
    logits = torch.randn(size, VOCAB, generator=torch.Generator().manual_seed(4))
    params = [random_params(rng) for _ in range(size)]
    tokens = [[rng.randrange(VOCAB) for _ in range(9)] for _ in range(size)]
    rows = [history(p, t, 3, (0,)) for p, t in zip(params, tokens, strict=True)]
    whole = sample_rows(logits.clone(), params, range(size), range(size), None, rows).tokens
    for row in range(size):
        one = logits[row : row + 1].clone()
        alone = history(params[row], tokens[row], 3, (0,))
        assert sample_rows(one, [params[row]], [row], [row], None, [alone]).tokens == [whole[row]]


def test_counts_follow_a_growing_sequence():
    counts = TokenCounts(with_prompt=True)
    tokens = [5, 6, 5]
    for token in [*range(200), 6, 6]:
        tokens.append(token)
        ids, numbers = counts.read(tokens, 3)
    found = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
    assert found == {token: tokens[3:].count(token) for token in tokens}
    assert TokenCounts(with_prompt=False).read([1, 2, 3], 2)[0].tolist() == [3]
