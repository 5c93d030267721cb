"""Lanes: bytes between ranks through shared memory, here of two ends in one process.

Run: pytest tests/unit/ops/test_lane.py
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops import lane as lane_op
from engine.ops.lane import Lane

pytestmark = pytest.mark.skipif(
    not lane_op.available(), reason="the compiled library is not there, so there are no lanes"
)


RING = 1 << 16


@contextmanager
def group(size: int) -> Iterator[list[Lane]]:
    segments = [lane_op.make_segment(size, RING) for _ in range(size)]
    pids = [os.getpid()] * size
    lanes = [Lane(rank, segments, pids, spin_s=0.0, ring=RING) for rank in range(size)]
    for segment in segments:
        os.close(segment)
    try:
        yield lanes
    finally:
        for each in lanes:
            each.close()


def start(lane: Lane, send: torch.Tensor, parts: list[int], into: torch.Tensor, recv: list[int]):
    at = [sum(parts[:rank]) for rank in range(lane.size)]
    return lane.start(0, send, at, parts, into, recv)


def both(*calls) -> None:
    """Every rank's call in a thread of its own; the first error is raised."""
    errors: list[BaseException] = []

    def run(call) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


sizes = st.one_of(st.integers(0, 200), st.integers(RING - 100, 2 * RING + 100))


@settings(max_examples=60)
@given(st.lists(st.lists(sizes, min_size=4, max_size=4), min_size=1, max_size=5))
def test_every_byte_arrives_in_its_place_whatever_the_sizes(messages: list[list[int]]):
    with group(2) as lanes:
        sends, intos, numbers = [], [], []
        for own0, to1, to0, own1 in messages:
            parts = [[own0, to1], [to0, own1]]
            recvs = [[own0, to0], [to1, own1]]
            send = [torch.randint(256, (sum(part),), dtype=torch.uint8) for part in parts]
            into = [torch.zeros(sum(recv), dtype=torch.uint8) for recv in recvs]
            numbers.append(
                [start(lanes[r], send[r], parts[r], into[r], recvs[r]) for r in range(2)]
            )
            sends.append([part.split(sizes) for part, sizes in zip(send, parts, strict=True)])
            intos.append(into)

        def wait(rank: int) -> None:
            for pair in reversed(numbers):  # in any order
                lanes[rank].wait(pair[rank], 20)

        both(lambda: wait(0), lambda: wait(1))
        for send, into in zip(sends, intos, strict=True):
            for rank in range(2):
                assert torch.equal(into[rank], torch.cat([send[0][rank], send[1][rank]]))


def test_one_message_to_all_is_a_gather():
    with group(3) as lanes:
        rows = [torch.full((5,), rank) for rank in range(3)]
        intos = [torch.empty(3, 5, dtype=torch.int64) for _ in range(3)]
        each = [40] * 3
        numbers = [lanes[r].start(1, rows[r], [0] * 3, each, intos[r], each) for r in range(3)]
        both(*(lambda r=r: lanes[r].wait(numbers[r], 20) for r in range(3)))
        for into in intos:
            assert torch.equal(into, torch.stack(rows))


def test_a_message_that_belongs_to_another_collective_is_refused_at_once():
    row, out = torch.zeros(8, dtype=torch.uint8), torch.empty(16, dtype=torch.uint8)
    for kind, size in ((1, 8), (0, 4)):
        with group(2) as (first, second):
            number = first.start(kind, row, [0, 0], [size] * 2, out, [size] * 2)
            second.start(0, row, [0, 0], [8, 8], out.clone(), [8, 8])
            for _ in range(2):  # and again, when asked again
                with pytest.raises(RuntimeError, match="rank 1 of the group sent"):
                    first.wait(number, 3600)  # a limit on the test ends it long before


def test_a_rank_that_leaves_is_named_but_what_it_sent_arrives():
    with group(2) as (first, second):
        row, out = torch.arange(4, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)
        second.start(0, row, [0, 0], [4, 4], out.clone(), [4, 4])
        second.close()
        last = first.start(0, row, [0, 0], [4, 4], out, [4, 4])
        first.wait(last, 20)
        assert out.tolist() == [0, 1, 2, 3] * 2
        after = first.start(0, row, [0, 0], [4, 4], out, [4, 4])
        with pytest.raises(RuntimeError, match="closed by rank 1 of the group"):
            first.wait(after, 20)
        with pytest.raises(RuntimeError, match="this rank has left"):
            second.wait(0, 1)


def test_a_rank_that_does_not_come_is_named_after_the_timeout():
    with group(3) as (first, second, third):
        row, out = torch.zeros(4, dtype=torch.uint8), torch.empty(12, dtype=torch.uint8)
        number = first.start(0, row, [0] * 3, [4] * 3, out, [4] * 3)
        second.start(0, row, [0] * 3, [4] * 3, out.clone(), [4] * 3)
        with pytest.raises(RuntimeError, match=r"timed out after \d+ ms; .* rank 2 of the group"):
            first.wait(number, 0.1)


@pytest.mark.parametrize(
    ("send_at", "send_bytes", "recv_bytes", "words"),
    [
        ([0, 4], [4, 5], [4, 4], "not within the 8 bytes sent"),
        ([0, -1], [4, 4], [4, 4], "not within the 8 bytes sent"),
        ([0, 4], [4, 4], [4, 5], "do not fit into 8"),
        ([0, 4], [4, 4], [3, 4], "own part"),
        ([0], [4], [4], "each of 2 ranks"),
    ],
)
def test_sizes_that_do_not_fit_their_tensors_are_refused(send_at, send_bytes, recv_bytes, words):
    with group(2) as (first, _):
        row, out = torch.zeros(8, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=words):
            first.start(0, row, send_at, send_bytes, out, recv_bytes)


def test_a_segment_has_no_name_and_a_bad_one_is_an_error():
    segment = lane_op.make_segment(2)
    assert "memfd" in os.readlink(f"/proc/self/fd/{segment}")
    os.close(segment)
    with pytest.raises(RuntimeError, match="cannot map"):
        Lane(0, [segment, segment], [os.getpid()] * 2, spin_s=0.0)
