"""What two all-to-alls say of a link. Run: pytest tests/unit/distributed/test_link.py"""

import pytest
import torch

from engine.distributed.collectives import COLLECTIVE_BYTES, GroupCollectives
from engine.distributed.groups import Group, Link
from engine.distributed.link import link_of, measure_link


def group_of(size: int, link: Link | None = None) -> Group:
    return Group(0, size, tuple(range(size)), None, link)  # pyright: ignore[reportArgumentType]


def test_latency_and_bandwidth_follow_from_a_small_and_a_large_all_to_all():
    link = link_of(20e-6, 20e-6 + 2**24 * 7 / 8 / 200e9, 4e-6, 8)
    assert link.latency_s == 20e-6 and link.launch_s == 4e-6
    assert link.bytes_per_s == pytest.approx(200e9, rel=1e-3)
    assert link.collective_bytes == pytest.approx(4e6, rel=1e-3)


def test_a_large_all_to_all_that_is_no_slower_says_that_the_link_is_fast():
    assert 0 < link_of(20e-6, 19e-6, 4e-6, 2).bytes_per_s < float("inf")


def test_nothing_is_measured_on_the_cpu_or_in_a_group_of_one():
    assert measure_link(group_of(2), group_of(2), torch.device("cpu")) is None
    assert measure_link(group_of(1), group_of(1), torch.device("cuda")) is None


def test_a_collective_costs_what_was_measured_else_the_constant():
    assert GroupCollectives(group_of(2)).collective_bytes == COLLECTIVE_BYTES
    measured = group_of(2, Link(20e-6, 200e9, 4e-6))
    assert GroupCollectives(measured).collective_bytes == pytest.approx(4e6)
