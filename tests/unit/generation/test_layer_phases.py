"""What each layer sees of a step where a policy sets phases per layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from engine.generation.control import ControlMessage
from engine.generation.moe_step import LayerPhases, build_moe_step, count_eligible
from engine.generation.sequence import Sequence
from engine.generation.step import Slice, Step
from engine.moe.step import MoEStep
from engine.request import Request, SamplingParams

PREFILL, DECODE = ("prefill",), ("decode",)
BOTH = (*PREFILL, *DECODE)


def test_the_phases_of_all_layers_follow_from_those_of_each():
    same = LayerPhases({0: PREFILL, 1: (), 2: PREFILL}, last=2)
    assert (same.all, same.counted, same.differ, same.limits_last) == (
        PREFILL,
        PREFILL,
        False,
        True,
    )
    other = LayerPhases({0: PREFILL, 1: DECODE, 2: ()}, last=2)
    assert (other.all, other.counted, other.differ) == (BOTH, PREFILL, True)
    assert not other.limits_last
    assert LayerPhases({0: PREFILL}, last=1).limits_last, "a dense last layer has no say"
    assert LayerPhases({0: (), 1: ()}, last=1).all == ()


def topology() -> Any:
    one = SimpleNamespace(size=1, rank=0)
    return SimpleNamespace(tensor=one, device=torch.device("cpu"))


def step_of(decoding: list[int], prompts: list[int]) -> Step:
    """A step of one token per sequence that decodes, then of whole prompts, by their lengths."""
    slices = []
    for index, length in enumerate([*decoding, *prompts]):
        request = Request(
            index=index, id=index, prompt_token_ids=[1] * length, params=SamplingParams()
        )
        decodes = index < len(decoding)
        start, run = (length, 1) if decodes else (0, length)
        slices.append(Slice(Sequence(request), start, run, samples=True))
    return Step.of(slices, len(decoding))


def made(step: Step, layers: LayerPhases, others: tuple[int, int]) -> MoEStep | None:
    """Build the step of rank 0 of two; others: prefill and decode tokens of rank 1."""
    prefill = count_eligible(step, PREFILL)
    own = message(prefill, step.num_tokens - prefill, count_eligible(step, layers.counted))
    counted = sum(n for n, phase in zip(others, BOTH, strict=True) if phase in layers.counted)
    messages = [own, message(*others, counted)]
    return build_moe_step(step, messages, layers.all, topology(), layers=layers)


def message(prefill: int, decode: int, eligible: int) -> ControlMessage:
    return ControlMessage(prefill, decode, 0, 0, 0, exhausted=False, tokens_eligible=eligible)


def test_a_layer_sees_the_tokens_of_its_own_phases():
    layers = LayerPhases({0: BOTH, 1: PREFILL, 2: DECODE, 3: ()}, last=3)
    step = made(step_of([4], [3, 2]), layers, others=(7, 5))
    assert step is not None and step.num_eligible == 18 and step.eligible_T is None
    assert step.of(0) is step.of(3) is step
    prefill, decode = step.of(1), step.of(2)
    assert prefill is not None and decode is not None
    assert (prefill.num_eligible, prefill.num_own_eligible) == (12, 5)
    assert (decode.num_eligible, decode.num_own_eligible) == (6, 1)
    assert prefill.eligible_T is not None and decode.eligible_T is not None
    assert prefill.eligible_T.tolist() == [False] + [True] * 5
    assert decode.eligible_T.tolist() == [True] + [False] * 5
    assert prefill.counts is decode.counts is step.counts
    assert not step.runs_last_whole and step.last is None


def test_a_layer_whose_phase_has_no_token_sees_no_step():
    layers = LayerPhases({0: PREFILL, 1: DECODE}, last=1)
    step = made(step_of([], [3]), layers, others=(2, 0))
    assert step is not None and step.of(1) is None
    first = step.of(0)
    assert first is not None and first.eligible_T is None and first.num_eligible == 5
    assert not step.runs_last_whole, "as a job in which decode alone is limited"
    step = made(step_of([], [3]), layers, others=(2, 1))
    assert step is not None and step.runs_last_whole
    seen = step.of(1)
    assert seen is not None and (seen.num_eligible, seen.num_own_eligible) == (1, 0)


def test_copies_take_rows_of_a_last_layer_that_drops_nothing():
    layers = LayerPhases({0: BOTH, 1: ()}, last=1, low_bit_copies=True)
    step = made(step_of([4], [3]), layers, others=(2, 0))
    assert step is not None and step.last is not None
    assert not step.last.limited and step.last.of(1) is step.last
