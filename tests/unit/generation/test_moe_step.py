"""The tokens of a step as capacity sees them. Run: pytest tests/unit/generation/test_moe_step.py"""

from engine.config import SchedulerConfig
from engine.generation.block_pool import BlockPool
from engine.generation.control import ControlMessage
from engine.generation.moe_step import _identify, static_bucket
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence
from engine.request import MAX_CHOICES, Request, SamplingParams


def test_choices_of_a_line_have_different_ids_and_the_first_has_its_positions():
    scheduler = Scheduler(SchedulerConfig(), BlockPool(64, 4), 64)
    line = Request.of_line(5, "a", [[1, 2, 3]], SamplingParams(n=3))
    last = Request(index=6, id="b", prompt_token_ids=[4], choice=MAX_CHOICES - 1)
    for each in (*line.choices, last):
        scheduler.add(Sequence(each))
    request_T, position_T, _ = _identify(scheduler.schedule(), ["prefill"])
    assert request_T.tolist() == [5] * 9 + [6]
    assert position_T[:3].tolist() == [0, 1, 2]
    assert len(set(zip(request_T.tolist(), position_T.tolist(), strict=True))) == 10
    assert position_T.min() == 0  # the last one's fits too


def message(prefill: int, decode: int) -> ControlMessage:
    return ControlMessage(prefill, decode, running=0, waiting=0, finished=0, exhausted=False)


def test_a_step_has_the_bucket_of_its_largest_rank_where_its_way_of_exchange_allows_it():
    decode = [message(0, 5), message(0, 9), message(0, 0)]
    assert static_bucket(decode, 1, "auto") == static_bucket(decode, 1, "static") == 16
    assert static_bucket(decode, 1, "counted") is None
    # A tensor group divides its tokens, which its first rank alone counts.
    assert static_bucket([message(0, 9), message(0, 0)], 2, "auto") == 8
    mixed = [message(3, 5), message(0, 1)]
    assert static_bucket(mixed, 1, "auto") is None
    assert static_bucket(mixed, 1, "static") == 8
    assert static_bucket([message(0, 257)], 1, "static") is None
