"""The outcome of a step. Run: pytest tests/unit/generation/sampling/test_step_outcome.py"""

import pytest
import torch

from engine.config import SchedulerConfig
from engine.generation.block_pool import BlockPool
from engine.generation.sampling import step_outcome
from engine.generation.sampling.step_outcome import read_step
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence
from engine.request import Completion, Request, SamplingParams

VOCAB = 11


def logits_of(rows: list[int]) -> torch.Tensor:
    """Logits that depend on the row's number alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, VOCAB, generator=generator)[rows]


def complete(each: list[SamplingParams], budget: int = 64) -> list[Completion]:
    """Run requests of 4 prompt tokens to their ends."""
    config = SchedulerConfig(max_batch_tokens=budget)
    scheduler = Scheduler(config, BlockPool(32, 4), 64)
    for index, params in enumerate(each):
        ids = [1, 2, 3, index]
        request = Request(index=index, id=index, prompt_token_ids=ids, params=params)
        scheduler.add(Sequence(request))
    done: list[Completion] = []
    while scheduler.has_work:
        step = scheduler.schedule()
        out = read_step(step, logits_of)
        finished = scheduler.commit(
            step, out.tokens, out.logprobs, out.prompt_logprobs, out.top, out.prompt_top
        )
        done += [seq.completion() for seq in finished]
    return sorted(done, key=lambda item: item.index)


@pytest.mark.parametrize("rows", [1, 2, 256])
def test_a_prompts_likeliest_tokens_are_those_of_its_rows_however_many_are_read_at_once(
    rows, monkeypatch
):
    monkeypatch.setattr(step_outcome, "_PROMPT_ROWS", rows)
    asked = SamplingParams(max_new_tokens=1, prompt_logprobs=2)
    done = complete([asked, SamplingParams(max_new_tokens=1), asked])
    exact = logits_of(list(range(12))).log_softmax(1)
    assert done[1].prompt_top_logprobs is None
    for item, first in ((done[0], 0), (done[2], 8)):
        assert item.prompt_top_logprobs is not None
        assert item.prompt_top_logprobs[0] is None
        for place, top in enumerate(item.prompt_top_logprobs[1:]):
            assert top is not None
            expected = exact[first + place].topk(2)
            assert [token for token, _ in top] == expected.indices.tolist()
            assert [p for _, p in top] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_a_token_is_greedy_where_it_is_the_first_of_the_likeliest():
    (done,) = complete([SamplingParams(max_new_tokens=3, logprobs=1)])
    assert done.top_logprobs is not None
    assert [top[0][0] for top in done.top_logprobs] == done.token_ids
    assert [top[0][1] for top in done.top_logprobs] == done.logprobs


def test_prompt_logprobs_of_a_prompt_in_chunks_are_complete():
    (done,) = complete([SamplingParams(max_new_tokens=1, prompt_logprobs=1)], budget=3)
    assert done.prompt_top_logprobs is not None
    assert [top is None for top in done.prompt_top_logprobs] == [True, False, False, False]
