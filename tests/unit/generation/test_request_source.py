"""How requests are partitioned over data ranks.

Run: pytest tests/unit/generation/test_request_source.py
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.generation.request_source import partition
from engine.request import Request, SamplingParams

SHAPES = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 70)), max_size=40)


def request(index: int, prompt: int, new: int) -> Request:
    params = SamplingParams(max_new_tokens=new)
    return Request(index=index, id=str(index), prompt_token_ids=[1] * prompt, params=params)


def indices(shares: list[list[Request]]) -> list[list[int]]:
    return [[each.index for each in share] for share in shares]


def tokens(share: list[Request]) -> int:
    return sum(len(each.prompt_token_ids) + each.params.max_new_tokens for each in share)


def test_the_longest_go_first_to_the_rank_with_fewest_tokens():
    requests = [request(i, prompt, 0) for i, prompt in enumerate([5, 1, 1, 4])]
    assert indices(partition(requests, 2)) == [[0, 2], [1, 3]]


def test_requests_of_one_length_go_to_the_ranks_in_turn():
    requests = [request(i, 8, 2) for i in range(5)]
    assert indices(partition(requests, 2)) == [[0, 2, 4], [1, 3]]


@given(shapes=SHAPES, num_ranks=st.integers(1, 5))
def test_every_request_has_one_rank_and_no_rank_a_whole_request_more_than_another(
    shapes, num_ranks
):
    requests = [request(i, *shape) for i, shape in enumerate(shapes)]
    shares = partition(requests, num_ranks)
    assert sorted(each.index for share in shares for each in share) == list(range(len(shapes)))
    assert all([e.index for e in share] == sorted(e.index for e in share) for share in shares)
    loads = [tokens(share) for share in shares]
    assert max(loads) - min(loads) <= max((sum(shape) for shape in shapes), default=0)
