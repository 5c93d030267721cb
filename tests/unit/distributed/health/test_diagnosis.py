"""Fault verdicts on hand-made sightings: who is accused, and when nobody may be.

Run: pytest tests/unit/distributed/health/test_diagnosis.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.distributed.health.diagnosis import (
    Diagnosis,
    Limits,
    PeerStatus,
    describe,
    diagnose,
    store_lost,
)
from engine.distributed.health.progress import WAITING, Progress

LIMITS = Limits(period=0.1, lost=2.5, quick=1.0, cut=1.5, stalled=4.0)
COMBINE = Progress(step=12, layer=3, phase="combine", collective=57)
DISPATCH = Progress(step=12, layer=3, phase="dispatch", collective=56)
GROUP = (0, 1, 2, 3)


def rank(place: Progress = COMBINE, **changes) -> PeerStatus:
    usual = PeerStatus(
        host="h0", state="running", place=place, heartbeat_age_s=0.3, progress_age_s=0.3
    )
    return replace(usual, **changes)


def ranks(**changed: PeerStatus) -> dict[int, PeerStatus]:
    """Four ranks, all well but for `r2=...`."""
    return {n: changed.get(f"r{n}", rank()) for n in GROUP}


def verdict(
    seen: dict[int, PeerStatus], own: int = 0, group: tuple[int, ...] = GROUP
) -> Diagnosis | None:
    return diagnose(seen, own, group, LIMITS)


def test_ranks_that_beat_and_move_are_well_wherever_they_are():
    assert verdict(ranks(r1=rank(DISPATCH, progress_age_s=3.9))) is None


def test_a_silent_rank_is_lost_with_where_it_was_last_seen():
    found = verdict(ranks(r2=rank(DISPATCH, heartbeat_age_s=2.6, host="h7")))
    assert found is not None and found.ranks == (2,)
    assert "rank 2 on h7 has not been heard of for 2.6 s" in found.text
    assert "step 12, layer 3, dispatch, collective 56" in found.text


def test_a_rank_lost_before_the_first_step_is_said_to_be_starting():
    early = {n: rank(Progress(), state="starting") for n in GROUP}
    early[3] = replace(early[3], heartbeat_age_s=3.0)
    found = verdict(early)
    assert found is not None and "last seen while starting" in found.text


def test_several_lost_ranks_are_all_named():
    found = verdict(ranks(r1=rank(heartbeat_age_s=9.0), r3=rank(heartbeat_age_s=9.0)))
    assert found is not None and found.ranks == (1, 3)
    assert "rank 1" in found.text and "rank 3" in found.text


def test_a_rank_that_has_left_in_order_may_be_silent():
    assert verdict(ranks(r1=rank(state="left", heartbeat_age_s=60.0))) is None


def test_a_rank_of_another_group_is_missed_too_but_cannot_stall_this_one():
    far = rank(DISPATCH, progress_age_s=60.0)
    assert verdict(ranks(r2=far, r3=far), group=(0, 1)) is None
    found = verdict(ranks(r2=rank(heartbeat_age_s=3.0)), group=(0, 1))
    assert found is not None and found.ranks == (2,)


def test_a_failure_that_a_rank_tells_comes_before_others_silence_and_leaves_time_to_go():
    bad = rank(state="failed", text="ValueError: no", progress_age_s=0.5, heartbeat_age_s=3.0)
    assert verdict(ranks(r1=bad)) is None, "the others may be leaving because of it"
    told = verdict(ranks(r1=replace(bad, progress_age_s=1.0), r2=rank(heartbeat_age_s=2.6)))
    assert told is not None and told.ranks == (1,) and not told.lost
    assert "failed in step 12, layer 3, combine, collective 57: ValueError: no" in told.text
    assert verdict({1: replace(bad, progress_age_s=9.0)}, own=1, group=(1,)) is None, "not itself"


def test_of_two_failures_the_earlier_is_told():
    bad = rank(state="failed", text="ValueError: no", progress_age_s=2.0)
    found = verdict(ranks(r1=replace(bad, progress_age_s=1.9), r3=bad))
    assert found is not None and found.ranks == (3,)


def test_once_a_collective_broke_silence_and_failure_are_told_sooner():
    cut = rank(state="cut", progress_age_s=0.1)
    quiet = rank(heartbeat_age_s=1.0)
    assert verdict(ranks(r1=quiet)) is None
    lost = verdict(ranks(r0=cut, r1=quiet))
    assert lost is not None and lost.ranks == (1,) and lost.lost
    failed = verdict(
        ranks(r2=cut, r1=rank(state="failed", text="ValueError: no", progress_age_s=0.0))
    )
    assert failed is not None and failed.ranks == (1,)


def test_the_rank_with_fewer_collectives_is_the_one_the_others_wait_for():
    still = {n: rank(progress_age_s=4.1) for n in GROUP} | {1: rank(DISPATCH, progress_age_s=4.5)}
    for own in GROUP:
        found = verdict(still, own)
        assert found is not None and found.ranks == (1,)
    assert "rank 1 on h0 has been at step 12, layer 3, dispatch, collective 56" in found.text
    assert "ranks 0, 2, 3 wait at step 12, layer 3, combine, collective 57" in found.text


def test_with_as_many_collectives_the_one_that_is_elsewhere_is_named():
    other = Progress(step=12, layer=4, phase="consensus", collective=57)
    still = {n: rank(progress_age_s=4.1) for n in GROUP} | {2: rank(other, progress_age_s=4.1)}
    found = verdict(still)
    assert found is not None and found.ranks == (2,)


def test_where_all_wait_in_the_same_collective_the_network_is_named_and_no_rank():
    found = verdict({n: rank(progress_age_s=4.1) for n in GROUP})
    assert found is not None and found.ranks == () and "network" in found.text


def test_one_rank_that_moves_is_enough_to_wait_on():
    still = {n: rank(progress_age_s=60.0) for n in GROUP} | {3: rank(DISPATCH, progress_age_s=1.0)}
    assert verdict(still) is None


def test_ranks_that_all_compute_are_left_to_it():
    experts = Progress(step=12, layer=3, phase="experts", collective=56)
    assert verdict({n: rank(experts, progress_age_s=60.0) for n in GROUP}) is None


def test_a_rank_that_computes_while_the_others_wait_for_it_is_named():
    experts = Progress(step=12, layer=3, phase="experts", collective=56)
    found = verdict(
        {n: rank(progress_age_s=4.1) for n in GROUP} | {1: rank(experts, progress_age_s=5.0)}
    )
    assert found is not None and found.ranks == (1,)
    assert "rank 1 on h0 has been at step 12, layer 3, experts, collective 56 for 5.0" in found.text


def test_a_rank_that_skipped_a_collective_may_be_ahead_of_the_others():
    ahead = Progress(step=12, layer=4, phase="consensus", collective=58)
    found = verdict(
        {n: rank(progress_age_s=4.1) for n in GROUP} | {2: rank(ahead, progress_age_s=4.1)}
    )
    assert found is not None and found.ranks == (2,)
    two = {0: rank(progress_age_s=4.1), 1: rank(DISPATCH, progress_age_s=4.1)}
    found = diagnose(two, 0, (0, 1), LIMITS)
    assert found is not None and found.ranks == (1,), "of two ranks the one that is behind"


def test_ranks_that_are_all_there_after_a_broken_collective_are_judged_by_their_places():
    cut = {n: rank(state="cut", progress_age_s=1.4, text="sizes differ") for n in GROUP}
    cut[1] = rank(DISPATCH, state="cut", progress_age_s=1.4)
    assert verdict(cut) is None, "a silent one might still be found"
    found = verdict({n: replace(each, progress_age_s=1.5) for n, each in cut.items()})
    assert found is not None and found.ranks == (1,)
    same = verdict({n: rank(state="cut", progress_age_s=1.5, text="sizes differ") for n in GROUP})
    assert same is not None and same.ranks == ()
    assert "a collective of ranks 0, 1, 2, 3, at step 12" in same.text
    assert "broke: sizes differ" in same.text


def test_a_collective_that_breaks_outside_of_the_steps_is_told_as_such():
    found = verdict(
        {n: rank(Progress(), state="cut", progress_age_s=1.5, text="reset") for n in GROUP}
    )
    assert found is not None and found.ranks == ()
    assert "outside of the steps, broke: reset" in found.text


def test_a_rank_that_left_the_steps_alone_is_named_once_the_others_break():
    found = verdict(
        {n: rank(state="cut", progress_age_s=1.5) for n in GROUP}
        | {3: rank(Progress(), state="left")}
    )
    assert found is not None and found.ranks == (3,)
    assert "rank 3 on h0 has left, while ranks 0, 1, 2 wait at step 12" in found.text


def test_a_store_that_does_not_answer_is_its_holders_silence_or_its_failure():
    seen = ranks(r0=rank(DISPATCH, host="h9"))
    found = store_lost(0, seen, 2.5)
    assert found.ranks == (0,) and found.lost
    assert "rank 0 on h9, which holds the store, has not answered for 2.5 s" in found.text
    assert "step 12, layer 3, dispatch, collective 56" in found.text
    told = store_lost(0, ranks(r0=rank(state="failed", text="ValueError: no")), 2.5)
    assert "rank 0 on h0 failed" in told.text and "ValueError: no" in told.text
    assert store_lost(None, seen, 2.5).ranks == ()


def test_a_rank_that_gets_on_before_the_loop_or_after_it_stalls_nobody():
    for state in ("starting", "finishing"):
        busy = outside("reading", state=state, progress_age_s=1.0)
        assert verdict({n: rank(progress_age_s=60.0) for n in GROUP} | {2: busy}) is None


@pytest.mark.parametrize("timeout", [2.0, 5.0, 20.0, 120.0, 3600.0])
def test_all_limits_lie_within_the_timeout(timeout):
    limits = Limits.of(timeout, 4)
    assert limits.period < limits.quick <= limits.lost <= timeout / 2
    assert limits.stalled < timeout and limits.quick < limits.cut < timeout


def test_many_ranks_beat_more_slowly_and_long_timeouts_do_not_wait_for_the_dead():
    assert Limits.of(120.0, 4).lost == 10.0
    many = Limits.of(120.0, 1024)
    assert many.period > Limits.of(120.0, 256).period and many.lost >= 4 * many.period
    assert many.cut < 120.0


def test_the_report_says_where_every_rank_was_and_stays_short():
    finding = Diagnosis((1,), "rank 1 is gone")
    lines = describe(finding, ranks(r2=rank(Progress(), state="starting"))).splitlines()
    assert lines[0] == "fault: rank 1 is gone" and len(lines) == 5
    assert lines[3] == "  rank 2 on h0: starting"
    many = describe(finding, {n: rank() for n in range(100)}).splitlines()
    assert len(many) == 18 and many[-1] == "  and 84 more ranks"


def outside(phase: str, **changes) -> PeerStatus:
    """A rank before or after the lockstep."""
    return rank(Progress(step=7, phase=phase), **{"state": "starting", **changes})


@pytest.mark.parametrize("state", ["starting", "running", "finishing"])
def test_a_rank_that_does_not_get_on_while_others_wait_for_its_part_is_named(state):
    seen = {n: outside(WAITING, state=state, progress_age_s=30.0) for n in GROUP}
    seen[2] = outside("loading the model", state=state, progress_age_s=4.0, host="h7")
    found = verdict(seen)
    assert found is not None and found.ranks == (2,)
    assert found.text == (
        "rank 2 on h7 has been loading the model for 4.0 s, while ranks 0, 1, 3 wait: it hangs "
        "there"
    )
    assert "rank 0 on h0: waiting for the others" in describe(found, seen)


def test_a_rank_that_gets_on_slowly_and_ranks_that_all_work_are_well():
    seen = {n: outside(WAITING, progress_age_s=30.0) for n in GROUP}
    seen[2] = outside("loading the model", progress_age_s=3.9)
    assert verdict(seen) is None
    assert verdict({n: outside("loading the model", progress_age_s=30.0) for n in GROUP}) is None
    assert verdict({n: outside(WAITING, progress_age_s=30.0) for n in GROUP}) is None


def test_a_rank_that_is_missed_in_the_first_collective_of_the_lockstep_is_named():
    seen = ranks(r1=outside("loading the model", progress_age_s=8.0))
    for n in (0, 2, 3):
        seen[n] = replace(seen[n], progress_age_s=4.1)
    found = verdict(seen)
    assert found is not None and found.ranks == (1,)
    assert (
        "rank 1 on h0 has been loading the model for 8.0 s, while ranks 0, 2, 3 wait at step"
        in (found.text)
    )


def test_where_a_collective_breaks_outside_of_the_lockstep_whoever_still_works_is_named():
    cut = {"state": "cut", "progress_age_s": 1.6, "text": "Timed out waiting 5000ms"}
    seen = {n: outside(WAITING, **cut) for n in GROUP}
    seen[3] = outside("loading the model", progress_age_s=3.0)
    found = verdict(seen)
    assert found is not None and found.ranks == (3,)
    seen[3] = outside(WAITING, progress_age_s=3.0)  # about to be cut too
    found = verdict(seen)
    assert found is not None and found.ranks == () and "Timed out" in found.text


def test_a_rank_lost_outside_of_the_lockstep_is_told_with_what_it_was_doing():
    seen = {n: outside(WAITING) for n in GROUP}
    seen[0] = outside("merging the output", state="finishing", heartbeat_age_s=2.6)
    found = verdict(seen, own=1)
    assert found is not None and "last seen while merging the output" in found.text
