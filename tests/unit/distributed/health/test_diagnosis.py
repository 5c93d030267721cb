"""Diagnoses of hand-made peer statuses: which ranks are at fault, and when none may be.

Run: pytest tests/unit/distributed/health/test_diagnosis.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.distributed.health.diagnosis import (
    Diagnosis,
    Limits,
    PeerStatus,
    diagnose,
    diagnose_store,
)
from engine.distributed.health.progress import WAITING, Progress
from tests.helpers.texts import missing_from

LIMITS = Limits(
    period_s=0.1,
    heartbeat_timeout_s=2.5,
    short_timeout_s=1.0,
    collective_timeout_s=1.5,
    stall_timeout_s=4.0,
)
COMBINE = Progress(step=12, layer=3, phase="combine", collective=57)
DISPATCH = Progress(step=12, layer=3, phase="dispatch", collective=56)
GROUP = (0, 1, 2, 3)


def rank(progress: Progress = COMBINE, **changes) -> PeerStatus:
    usual = PeerStatus(
        host="h0", state="running", progress=progress, heartbeat_age_s=0.3, progress_age_s=0.3
    )
    return replace(usual, **changes)


def ranks(**changed: PeerStatus) -> dict[int, PeerStatus]:
    """Four healthy ranks, but for `r2=...`."""
    return {n: changed.get(f"r{n}", rank()) for n in GROUP}


def diagnosis(
    peers: dict[int, PeerStatus], own: int = 0, group: tuple[int, ...] = GROUP
) -> Diagnosis | None:
    return diagnose(peers, own, group, LIMITS)


def test_ranks_with_heartbeats_and_progress_are_healthy_wherever_they_are():
    assert diagnosis(ranks(r1=rank(DISPATCH, progress_age_s=3.9))) is None


def test_a_rank_without_heartbeats_is_dead_with_where_it_was_last_seen():
    found = diagnosis(ranks(r2=rank(DISPATCH, heartbeat_age_s=2.6, host="h7")))
    assert found is not None and found.ranks == (2,)
    at = "step 12, layer 3, dispatch, collective 56"
    assert not missing_from(found.text, "rank 2 on h7", "no heartbeat", "2.6 s", at)


def test_a_rank_that_dies_before_the_first_step_is_reported_as_starting():
    early = {n: rank(Progress(), state="starting") for n in GROUP}
    early[3] = replace(early[3], heartbeat_age_s=3.0)
    found = diagnosis(early)
    assert found is not None and "last seen while starting" in found.text


def test_several_dead_ranks_are_all_named():
    found = diagnosis(ranks(r1=rank(heartbeat_age_s=9.0), r3=rank(heartbeat_age_s=9.0)))
    assert found is not None and found.ranks == (1, 3)
    assert "rank 1" in found.text and "rank 3" in found.text


def test_a_rank_that_has_exited_needs_no_heartbeats():
    assert diagnosis(ranks(r1=rank(state="exited", heartbeat_age_s=60.0))) is None


def test_a_rank_of_another_group_can_be_dead_but_cannot_stall_this_one():
    far = rank(DISPATCH, progress_age_s=60.0)
    assert diagnosis(ranks(r2=far, r3=far), group=(0, 1)) is None
    found = diagnosis(ranks(r2=rank(heartbeat_age_s=3.0)), group=(0, 1))
    assert found is not None and found.ranks == (2,)


def test_a_published_failure_comes_before_missing_heartbeats_and_leaves_time_to_exit():
    bad = rank(state="failed", error="ValueError: no", progress_age_s=0.5, heartbeat_age_s=3.0)
    assert diagnosis(ranks(r1=bad)) is None, "the others may be exiting because of it"
    found = diagnosis(ranks(r1=replace(bad, progress_age_s=1.0), r2=rank(heartbeat_age_s=2.6)))
    assert found is not None and found.ranks == (1,) and not found.unreachable
    at = "step 12, layer 3, combine, collective 57"
    assert not missing_from(found.text, "failed", at, "ValueError: no")
    assert diagnosis({1: replace(bad, progress_age_s=9.0)}, own=1, group=(1,)) is None, "not itself"


def test_of_two_failures_the_earlier_is_reported():
    bad = rank(state="failed", error="ValueError: no", progress_age_s=2.0)
    found = diagnosis(ranks(r1=replace(bad, progress_age_s=1.9), r3=bad))
    assert found is not None and found.ranks == (3,)


def test_once_a_collective_failed_deaths_and_failures_are_diagnosed_sooner():
    broken = rank(state="collective_failed", progress_age_s=0.1)
    late = rank(heartbeat_age_s=1.0)
    assert diagnosis(ranks(r1=late)) is None
    dead = diagnosis(ranks(r0=broken, r1=late))
    assert dead is not None and dead.ranks == (1,) and dead.unreachable
    failed = diagnosis(
        ranks(r2=broken, r1=rank(state="failed", error="ValueError: no", progress_age_s=0.0))
    )
    assert failed is not None and failed.ranks == (1,)


def test_the_rank_with_fewer_collectives_is_the_one_the_others_wait_for():
    stalled = {n: rank(progress_age_s=4.1) for n in GROUP} | {1: rank(DISPATCH, progress_age_s=4.5)}
    for own in GROUP:
        found = diagnosis(stalled, own)
        assert found is not None and found.ranks == (1,)
    slow, _, others = found.text.partition(", while ")
    assert not missing_from(slow, "rank 1 on h0", "step 12, layer 3, dispatch, collective 56")
    assert not missing_from(others, "ranks 0, 2, 3", "step 12, layer 3, combine, collective 57")


def test_with_equal_collectives_the_rank_in_another_phase_is_named():
    other = Progress(step=12, layer=4, phase="consensus", collective=57)
    stalled = {n: rank(progress_age_s=4.1) for n in GROUP} | {2: rank(other, progress_age_s=4.1)}
    found = diagnosis(stalled)
    assert found is not None and found.ranks == (2,)


def test_where_all_wait_in_the_same_collective_the_network_is_named_and_no_rank():
    found = diagnosis({n: rank(progress_age_s=4.1) for n in GROUP})
    assert found is not None and found.ranks == () and "network" in found.text


def test_while_one_rank_makes_progress_the_group_is_not_stalled():
    stalled = {n: rank(progress_age_s=60.0) for n in GROUP} | {
        3: rank(DISPATCH, progress_age_s=1.0)
    }
    assert diagnosis(stalled) is None


def test_ranks_that_all_compute_are_not_stalled():
    experts = Progress(step=12, layer=3, phase="experts", collective=56)
    assert diagnosis({n: rank(experts, progress_age_s=60.0) for n in GROUP}) is None


def test_a_rank_that_computes_while_the_others_wait_for_it_is_named():
    experts = Progress(step=12, layer=3, phase="experts", collective=56)
    found = diagnosis(
        {n: rank(progress_age_s=4.1) for n in GROUP} | {1: rank(experts, progress_age_s=5.0)}
    )
    assert found is not None and found.ranks == (1,)
    at = "step 12, layer 3, experts, collective 56"
    assert not missing_from(found.text, "rank 1 on h0", at, "5.0 s")


def test_a_rank_that_skipped_a_collective_may_be_ahead_of_the_others():
    ahead = Progress(step=12, layer=4, phase="consensus", collective=58)
    found = diagnosis(
        {n: rank(progress_age_s=4.1) for n in GROUP} | {2: rank(ahead, progress_age_s=4.1)}
    )
    assert found is not None and found.ranks == (2,)
    two = {0: rank(progress_age_s=4.1), 1: rank(DISPATCH, progress_age_s=4.1)}
    found = diagnose(two, 0, (0, 1), LIMITS)
    assert found is not None and found.ranks == (1,), "of two ranks the one that is behind"


def test_ranks_that_are_all_alive_after_a_failed_collective_are_diagnosed_by_their_progress():
    broken = {"state": "collective_failed", "error": "sizes differ"}
    failed = {n: rank(progress_age_s=1.4, **broken) for n in GROUP}
    failed[1] = rank(DISPATCH, state="collective_failed", progress_age_s=1.4)
    assert diagnosis(failed) is None, "a dead one might be found yet"
    found = diagnosis({n: replace(each, progress_age_s=1.5) for n, each in failed.items()})
    assert found is not None and found.ranks == (1,)
    same = diagnosis({n: rank(progress_age_s=1.5, **broken) for n in GROUP})
    assert same is not None and same.ranks == ()
    assert not missing_from(same.text, "ranks 0, 1, 2, 3", "step 12", "sizes differ")


def test_a_collective_that_fails_outside_of_the_steps_is_reported_as_such():
    broken = {"state": "collective_failed", "error": "reset"}
    found = diagnosis({n: rank(Progress(), progress_age_s=1.5, **broken) for n in GROUP})
    assert found is not None and found.ranks == ()
    assert not missing_from(found.text, "outside of the steps", "reset")


def test_a_rank_that_exited_alone_is_named_once_the_others_fail():
    found = diagnosis(
        {n: rank(state="collective_failed", progress_age_s=1.5) for n in GROUP}
        | {3: rank(Progress(), state="exited")}
    )
    assert found is not None and found.ranks == (3,)
    exited, _, others = found.text.partition(", while ")
    assert not missing_from(exited, "rank 3 on h0", "exited")
    assert not missing_from(others, "ranks 0, 1, 2", "step 12")


def test_a_store_that_does_not_answer_is_the_death_or_the_failure_of_its_rank():
    peers = ranks(r0=rank(DISPATCH, host="h9"))
    found = diagnose_store(0, peers, 2.5)
    assert found.ranks == (0,) and found.unreachable
    at = "step 12, layer 3, dispatch, collective 56"
    assert not missing_from(found.text, "rank 0 on h9", "holds the store", "2.5 s", at)
    failed = diagnose_store(0, ranks(r0=rank(state="failed", error="ValueError: no")), 2.5)
    assert not missing_from(failed.text, "rank 0 on h0", "failed", "ValueError: no")
    assert diagnose_store(None, peers, 2.5).ranks == ()


def test_a_rank_with_progress_before_or_after_the_lockstep_is_no_stall():
    for state in ("starting", "finishing"):
        busy = outside("reading", state=state, progress_age_s=1.0)
        assert diagnosis({n: rank(progress_age_s=60.0) for n in GROUP} | {2: busy}) is None


@pytest.mark.parametrize("timeout", [2.0, 5.0, 20.0, 120.0, 3600.0])
def test_all_limits_lie_within_the_timeout(timeout):
    limits = Limits.of(timeout, 4)
    assert limits.period_s < limits.short_timeout_s <= limits.heartbeat_timeout_s <= timeout / 2
    assert limits.short_timeout_s < limits.collective_timeout_s < timeout
    assert limits.stall_timeout_s < timeout


def test_many_ranks_have_a_longer_period_and_long_timeouts_do_not_wait_for_the_dead():
    assert Limits.of(120.0, 4).heartbeat_timeout_s == 10.0
    many = Limits.of(120.0, 1024)
    assert many.period_s > Limits.of(120.0, 256).period_s
    assert many.heartbeat_timeout_s >= 4 * many.period_s
    assert many.collective_timeout_s < 120.0


def test_the_report_lists_every_ranks_progress_and_stays_short():
    fault = Diagnosis((1,), "rank 1 is dead")
    lines = fault.report(ranks(r2=rank(Progress(), state="starting"))).splitlines()
    assert lines[0] == "fault: rank 1 is dead" and len(lines) == 5
    assert lines[3] == "  rank 2 on h0: starting"
    many = fault.report({n: rank() for n in range(100)}).splitlines()
    assert len(many) == 18 and many[-1] == "  and 84 more ranks"


def outside(phase: str, **changes) -> PeerStatus:
    """A rank before or after the lockstep."""
    return rank(Progress(step=7, phase=phase), **{"state": "starting", **changes})


@pytest.mark.parametrize("state", ["starting", "running", "finishing"])
def test_a_rank_without_progress_while_others_wait_for_its_part_is_named(state):
    peers = {n: outside(WAITING, state=state, progress_age_s=30.0) for n in GROUP}
    peers[2] = outside("loading the model", state=state, progress_age_s=4.0, host="h7")
    found = diagnosis(peers)
    assert found is not None and found.ranks == (2,)
    assert found.text == (
        "rank 2 on h7 has been loading the model for 4.0 s, while ranks 0, 1, 3 wait: it hangs "
        "there"
    )
    assert "rank 0 on h0: waiting for the others" in found.report(peers)


def test_a_rank_with_slow_progress_and_ranks_that_all_work_are_healthy():
    peers = {n: outside(WAITING, progress_age_s=30.0) for n in GROUP}
    peers[2] = outside("loading the model", progress_age_s=3.9)
    assert diagnosis(peers) is None
    assert diagnosis({n: outside("loading the model", progress_age_s=30.0) for n in GROUP}) is None
    assert diagnosis({n: outside(WAITING, progress_age_s=30.0) for n in GROUP}) is None


def test_a_rank_that_is_missing_in_the_first_collective_of_the_lockstep_is_named():
    peers = ranks(r1=outside("loading the model", progress_age_s=8.0))
    for n in (0, 2, 3):
        peers[n] = replace(peers[n], progress_age_s=4.1)
    found = diagnosis(peers)
    assert found is not None and found.ranks == (1,)
    slow, _, others = found.text.partition(", while ")
    assert not missing_from(slow, "rank 1 on h0", "loading the model", "8.0 s")
    assert not missing_from(others, "ranks 0, 2, 3", "at step")


def test_where_a_collective_fails_outside_of_the_lockstep_a_rank_that_works_on_is_named():
    broken = {"state": "collective_failed", "error": "Timed out waiting 5000ms"}
    peers = {n: outside(WAITING, progress_age_s=1.6, **broken) for n in GROUP}
    peers[3] = outside("loading the model", progress_age_s=3.0)
    found = diagnosis(peers)
    assert found is not None and found.ranks == (3,)
    peers[3] = outside(WAITING, progress_age_s=3.0)  # its collective is about to fail too
    found = diagnosis(peers)
    assert found is not None and found.ranks == () and "Timed out" in found.text


def test_a_rank_that_dies_outside_of_the_lockstep_is_reported_with_what_it_was_doing():
    peers = {n: outside(WAITING) for n in GROUP}
    peers[0] = outside("merging the output", state="finishing", heartbeat_age_s=2.6)
    found = diagnosis(peers, own=1)
    assert found is not None and "last seen while merging the output" in found.text
