"""The tokens of a step that is read late are those that `read_step` gives.

Run: pytest tests/unit/generation/late/test_late_step.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.generation.late.late_step import LateStep, can_be_late
from engine.generation.sampling import static_sampler
from engine.generation.sampling.step_outcome import read_step
from engine.generation.sequence import Sequence, Status
from engine.generation.step import Slice, Step
from engine.request import Request, SamplingParams

VOCAB = 60
PLAIN = {"temperature": 1.0}
NUCLEUS = {"temperature": 1.0, "top_p": 0.9}


def step_of(*ways: dict[str, Any], prompt: int = 4) -> Step:
    """A step of one whole prompt per way of choosing."""
    pieces = []
    for index, way in enumerate(ways):
        params = SamplingParams(seed=index, **way)
        ids = [(3 * index + each) % VOCAB for each in range(prompt)]
        seq = Sequence(Request(index=index, id=f"r{index}", prompt_token_ids=ids, params=params))
        seq.status = Status.RUNNING
        pieces.append(Slice(seq, 0, prompt, True))
    return Step.of(pieces, 0)


def logits_of(step: Step, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(len(step.sampling), VOCAB, generator=made)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_those_that_are_read_at_once(seed: int) -> None:
    step = step_of({}, PLAIN, {"temperature": 0.7, "top_k": 5}, NUCLEUS, {"top_p": 0.5}, PLAIN)
    logits_SV = logits_of(step, seed)
    late = LateStep.launch(step, logits_SV.clone())
    late.copy_out()
    outcome, wrong = late.read()
    expected = read_step(step, lambda _: logits_SV)
    assert (outcome, wrong) == (expected, [])
    assert late.fed.tokens_S.tolist() == outcome.tokens
    rows = [late.fed.row_of[id(piece.seq)] for piece in step.sampling]
    assert rows == list(range(len(step.sampling)))


def test_logits_that_are_not_finite_fail_the_same_slices_with_the_same_words() -> None:
    step = step_of({}, PLAIN, {})
    logits_SV = logits_of(step)
    logits_SV[0, 5] = logits_SV[1, 0] = float("nan")
    late = LateStep.launch(step, logits_SV.clone())
    outcome, wrong = late.read()
    assert (outcome, wrong) == (read_step(step, lambda _: logits_SV), [])
    assert sorted(outcome.errors) == [0, 1] and "'r0'" in outcome.errors[0]
    assert min(late.fed.tokens_S.tolist()) >= 0, "the next step runs on some token"


def test_rows_that_are_surplus_or_void_fail_nothing() -> None:
    step = step_of({}, {}, {})
    late = LateStep.launch(step, torch.full((3, VOCAB), float("nan")))
    step.slices[0].seq.status = Status.FINISHED
    late.void = {2}
    outcome, _ = late.read()
    assert list(outcome.errors) == [1]


def test_a_row_that_needs_more_tokens_sorted_has_its_token_and_is_named(monkeypatch) -> None:
    step = step_of(NUCLEUS, PLAIN, {})
    logits_SV = logits_of(step) / 100
    expected = read_step(step, lambda _: logits_SV.clone()).tokens
    monkeypatch.setattr(static_sampler, "NUCLEUS_CANDIDATES", 2)
    late = LateStep.launch(step, logits_SV.clone())
    outcome, wrong = late.read()
    assert outcome.tokens == expected and not outcome.errors
    assert wrong == [step.slices[0]]


@pytest.mark.parametrize(
    ("way", "late"),
    [
        ({}, True),
        (PLAIN, True),
        (NUCLEUS, True),
        ({"stop_token_ids": (3,)}, True),
        ({"logprobs": True}, False),
        ({"prompt_logprobs": True}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"min_tokens": 3, "stop_token_ids": (3,)}, False),
    ],
)
def test_a_step_is_read_at_once_where_the_host_has_a_part_in_a_row(way, late: bool) -> None:
    assert can_be_late(step_of({}, way), VOCAB, takes_back=True) is late


def test_a_step_that_samples_nothing_is_committed_at_once() -> None:
    step = step_of({})
    step = Step.of([Slice(step.slices[0].seq, 0, 2, False)], 0)
    assert not can_be_late(step, VOCAB, takes_back=True)


def test_recurrent_states_take_no_token_back() -> None:
    step = step_of(NUCLEUS)
    assert can_be_late(step, VOCAB, takes_back=False), "all candidates are sorted"
    assert not can_be_late(step, 5000, takes_back=False)
    assert can_be_late(step, 5000, takes_back=True)
    assert can_be_late(step_of({**NUCLEUS, "top_k": 9}), 5000, takes_back=False)
