"""What a job's report counts of its completions."""

from __future__ import annotations

from engine.batch.run import _Counts
from engine.request import Completion, Request, SamplingParams


def completion(choice: int, prompt_tokens: int, new_tokens: int, n: int = 1) -> Completion:
    """Of a choice of request 0; `n` choices per prompt."""
    request = Request(
        index=0,
        id="a",
        prompt_token_ids=[1] * prompt_tokens,
        params=SamplingParams(n=n),
        choice=choice,
    )
    tokens = list(range(new_tokens))
    return Completion(
        0, None, "", tokens, "length", prompt_tokens, new_tokens, cached_tokens=2, request=request
    )


def test_every_choice_of_a_line_counts_and_its_prompt_once():
    first = completion(0, 5, 8, n=2)
    first.others = [completion(1, 5, 7, n=2)]
    counts = _Counts()
    counts.add([first, completion(0, 3, 1)])
    assert (counts.requests, counts.generated_tokens) == (2, 8 + 7 + 1)
    assert (counts.prompt_tokens, counts.cached_tokens) == (5 + 3, 2 + 2)


def test_every_prompt_of_a_line_counts():
    first = completion(0, 5, 8)
    first.others = [completion(1, 4, 6)]
    counts = _Counts()
    counts.add([first])
    assert (counts.requests, counts.prompt_tokens, counts.generated_tokens) == (1, 9, 14)
    assert counts.cached_tokens == 4
