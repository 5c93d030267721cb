"""tools/soak.py without its processes: the choice of faults, and the check of the records.

python -m pytest tests/tools/test_soak.py
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter

import pytest
import soak
from bench.parts import written
from chaos.faults import KINDS, Fault, faults
from chaos.job import Job, tear
from chaos.records import Comparison, compare
from chaos.session import Outcome


def record(name: str, **changes) -> str:
    fields = {"id": name, "text": "t", "token_ids": [1, 2], "finish_reason": "length"}
    return json.dumps(fields | {"usage": {"prompt_tokens": 3, "completion_tokens": 2}} | changes)


UNDISTURBED = [record(name) for name in ("a", "b", "c")]


def test_records_are_compared_without_what_depends_on_the_run():
    assert compare(UNDISTURBED, UNDISTURBED).same
    other_run = [record(name, capacity={"dropped": 0}) for name in ("a", "b", "c")]
    assert compare(other_run, UNDISTURBED).same


@pytest.mark.parametrize(
    "lines, wrong",
    [
        ([record("a"), record("c")], {"lost": ("b",)}),
        ([record("a"), record("b"), record("b"), record("c")], {"doubled": ("b",)}),
        ([record("a"), record("b", text="u"), record("c")], {"differing": ("b",)}),
        ([record("a"), record("b", token_ids=[1, 3]), record("c")], {"differing": ("b",)}),
        ([record("a"), record("b", finish_reason="stop"), record("c")], {"differing": ("b",)}),
        ([record("a"), record("b", usage={}), record("c")], {"differing": ("b",)}),
        ([record("a"), record("b", error={"line": 1}), record("c")], {"differing": ("b",)}),
        ([*UNDISTURBED, record("d")], {"strange": ("d",)}),
        ([*UNDISTURBED, '{"id": "d", "te'], {"strange": ('{"id": "d", "te',)}),
        ([record("b"), record("a"), record("c")], {"in_order": False}),
        ([], {"lost": ("a", "b", "c")}),
    ],
)
def test_what_is_wrong_with_the_records_is_found_and_named(lines, wrong):
    found = compare(lines, UNDISTURBED)
    expected = {"lost": (), "doubled": (), "differing": (), "strange": (), "in_order": True}
    assert found == Comparison(**expected | wrong)
    assert not found.same


def take(number: int, *arguments) -> list[Fault]:
    return list(itertools.islice(faults(*arguments), number))


def test_a_seed_gives_one_sequence_and_another_seed_another():
    assert take(50, 1) == take(50, 1) != take(50, 2)


def test_every_kind_comes_once_before_any_comes_twice():
    kinds = [fault.kind for fault in take(3 * len(KINDS), 7)]
    for start in range(0, len(kinds), len(KINDS)):
        assert sorted(kinds[start : start + len(KINDS)]) == sorted(KINDS)
    assert {fault.kind for fault in take(20, 7, ["kill_rank", "torn_tail"])} == {
        "kill_rank",
        "torn_tail",
    }


def test_every_rank_can_be_a_victim_and_some_faults_come_while_the_ranks_start():
    some = take(200, 3)
    for num_ranks in (1, 2, 4):
        assert {fault.rank(num_ranks) for fault in some} == set(range(num_ranks))
    assert 20 < sum(fault.early for fault in some) < 80
    assert not any(fault.early for fault in some if fault.kind == "torn_tail")


def test_a_torn_tail_is_cut_from_the_largest_shard(tmp_path):
    output = tmp_path / "out.jsonl"
    assert not tear(output, 5), "there is nothing to cut"
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    (parts / "part-00000.jsonl").write_text("0123")
    (parts / "part-00001.jsonl").write_text("0123456789")
    assert written(output) == 14
    assert tear(output, 4)
    assert (parts / "part-00001.jsonl").read_text() == "012345"
    assert written(output) == 10


def test_shards_that_are_merged_during_the_search_are_none(tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()

    def merged_first(look):
        def call(folder):
            if parts.exists():
                parts.rmdir()
            return look(folder)

        return call

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, merged_first(getattr(os, name)))
    assert written(output) == 0
    assert not parts.exists()


def test_the_job_holds_a_line_that_becomes_an_error_record(tmp_path):
    job = Job(tmp_path, 10, 5.0)
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    assert len(lines) == 10
    bad = [line for line in lines if not line.endswith("}")]
    assert len(bad) == 1
    assert str(tmp_path / "in.jsonl") in job.command(tmp_path / "out.jsonl")


def fault(kind: str) -> Fault:
    return next(each for each in faults(1) if each.kind == kind)


GOOD = Comparison((), (), (), (), True)


def test_the_table_counts_faults_and_wrong_records_of_their_jobs():
    log = soak.Log()
    log.outcomes = [
        Outcome(fault("kill_rank"), 2, injected=True, gone_s=1.0, back_s=2.0),
        Outcome(fault("kill_rank"), 4, injected=True, gone_s=3.0),
        Outcome(fault("pause_rank"), 4, injected=True),
    ]
    bad = Comparison(("r1",), ("r2", "r3"), ("r4",), ("x",), True)
    log.jobs = [(Counter(kill_rank=2), bad), (Counter(pause_rank=1), GOOD)]
    rows = {row["kind"]: row for row in soak.rows_of(log)}
    killed, paused = rows["kill_rank"], rows["pause_rank"]
    assert (killed["injected"], killed["gone_s_median"], killed["gone_s_max"]) == (2, 2.0, 3.0)
    assert (killed["restart_s_max"], killed["survived"]) == (2.0, 0)
    assert (killed["lost"], killed["doubled"], killed["differing"]) == (1, 2, 2)
    assert (paused["survived"], paused["gone_s_max"], paused["lost"]) == (1, None, 0)
    assert rows["stop_rank"]["injected"] == 0
    assert not log.good


@pytest.mark.parametrize(
    "jobs, problems, good",
    [
        ([], [], True),
        ([(Counter(), GOOD)], ["a run had not ended"], False),
        ([(Counter(), Comparison(("a",), (), (), (), True))], [], False),
        ([(Counter(), Comparison((), (), (), (), False))], [], False),
    ],
)
def test_a_soak_is_good_only_when_nothing_is_wrong(jobs, problems, good):
    log = soak.Log(jobs=jobs, problems=problems)
    assert log.good == good
