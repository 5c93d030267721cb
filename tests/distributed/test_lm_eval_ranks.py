"""Ranks of an evaluation: rank 0 drives the engine, and its failures end the other ranks.

Run: pytest tests/distributed/test_lm_eval_ranks.py
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from typing import Any

import pytest

from engine.config.loader import load_config
from engine.interop.lm_eval_ranks import DriverFailed, EvaluationRanks, Job
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks

SCORE = SamplingParams(max_new_tokens=0, prompt_logprobs=True, prompt_top_logprobs=1)
DROP = ["moe.capacity.policy=token_drop", "moe.capacity.scope=rank", "moe.capacity.factor=1"]
TEXTS = ["recall: brown dress, head tiger? brown", "sum: 47 + 38 =", "def main():"]


def config_of(*overrides: str):
    return load_config("tiny_mixtral", ["profiler.enabled=false", *overrides])


def jobs_of(ranks: EvaluationRanks) -> list[Job]:
    scored = [Job(ranks.llm.encode(text), SCORE, 2) for text in TEXTS]
    greedy = SamplingParams(max_new_tokens=4)
    return scored + [Job(ranks.llm.encode(text), greedy) for text in TEXTS]


def evaluate(rank: int, changes: list[list[str]]) -> Any:
    """Outcomes and usage under each of some settings, from rank 0."""
    ranks, found = EvaluationRanks(config_of(*changes[0])), []
    with ranks.driving() as is_driver:
        if is_driver:
            assert rank == 0
            for overrides in changes:
                ranks.use(config_of(*overrides))
                outcomes = ranks.run(jobs_of(ranks))
                found.append(([asdict(each) for each in outcomes], ranks.usage))
    ranks.close()
    return found


def test_scores_and_texts_do_not_depend_on_the_ranks():
    alone, _ = run_ranks(evaluate, 1, [[]])[0][0]
    several = run_ranks(evaluate, 3, [["parallel.expert=3"]])
    assert several[1:] == [[], []]
    for one, other in zip(alone, several[0][0][0], strict=True):
        assert other == one | {"logprob": pytest.approx(one["logprob"], abs=1e-5)}
    texts = [each["text"] for each in alone]
    assert texts[3].startswith(" dress") and not any(texts[:3])
    assert all(each["error"] is None and each["logprob"] < 0 for each in alone[:3])


def test_settings_change_between_runs_with_and_without_a_new_engine():
    changes = [
        ["parallel.expert=2"],
        ["parallel.expert=2", *DROP],
        ["parallel.expert=2", "scheduler.max_batch_tokens=64"],
        ["parallel.expert=1"],
    ]
    dropless, dropped, again, replicas = run_ranks(evaluate, 2, changes)[0]
    assert dropless[1].dropped == 0 and dropless[1].assignments == 0
    assert dropped[1].dropped > 0 and dropped[1].drop_rate < 1
    assert dropped[1].share_after > dropless[1].share_after
    assert dropped[1].speed_bound > dropless[1].speed_bound == 1.0
    assert dropped[0] != dropless[0]
    for other in (again, replicas):
        for one, two in zip(dropless[0], other[0], strict=True):
            assert two == one | {"logprob": pytest.approx(one["logprob"], abs=1e-5)}


def fail(rank: int, kind: str) -> tuple[str, str, float]:
    """What each rank raises where rank 0's part fails, and how long it took."""
    began = time.monotonic()
    ranks = EvaluationRanks(config_of("parallel.expert=2"))
    try:
        with ranks.driving() as is_driver:
            if is_driver:
                ranks.use(config_of("parallel.expert=2"))
                if kind == "settings":
                    ranks.use(config_of("parallel.expert=2", "model.max_model_len=100000"))
                raise {"task": KeyError, "user": ValueError}[kind]("recall")
    except (ValueError, KeyError, DriverFailed) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "kind, first, second",
    [
        ("task", ("KeyError", "recall"), ("DriverFailed", "KeyError.*recall")),
        ("user", ("ValueError", "recall"), ("RankError", "recall")),
        ("settings", ("RankError", "max_model_len"), ("RankError", "max_model_len")),
    ],
)
def test_no_rank_waits_for_rank_0_once_it_has_failed(kind, first, second):
    for (name, text), found in zip((first, second), run_ranks(fail, 2, kind), strict=True):
        assert found[0] == name
        assert re.search(text, found[1])
