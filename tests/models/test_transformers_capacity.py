"""Token Drop and Expanded Drop in models that transformers builds, against a plain rule.

python -m pytest tests/models/test_transformers_capacity.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig, MoEConfig
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.models.registry import build_model, read_config
from engine.models.transformers_model.spec import scores_of
from tests.helpers.model_cases import CASES, make_reference
from tests.helpers.model_harness import load_model, make_config
from tests.helpers.ranks import run_ranks
from tests.helpers.transformers_capacity import SCORES, Ran, plain, served, served_on_ranks
from tests.helpers.transformers_cases import FOREIGN_CASES
from tests.models.test_transformers_implementation import OWN, job

TOKEN_DROP = {"policy": "token_drop", "factor": "0.6"}
POLICIES = [
    TOKEN_DROP,
    {"policy": "expanded_drop", "factor": "0.9"},
    {"policy": "expanded_drop", "factor": "1.0", "extras": "dropped", "renormalize": True},
]

# One of each kind of score; the others run in `make test-long`.
FAST = {"granitemoe", "phimoe", "exaone-moe", "laguna"}
assert FAST <= SCORES.keys()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def path(name: str) -> Path:
        case = {**CASES, **FOREIGN_CASES}[name]
        return make_reference(case, tmp_path_factory.mktemp("checkpoint")).path

    return path


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


def policies_of(name: str) -> list[dict[str, Any]]:
    return [TOKEN_DROP] if SCORES[name].score == "weights" else POLICIES


def check(name: str, path: Path, settings: dict[str, Any], found: list[Ran]) -> None:
    wanted = plain(path, FOREIGN_CASES[name], SCORES[name], settings, len(found))
    assert sum(each.dropped for each in found) == wanted.dropped > 0
    assert sum(each.added for each in found) == wanted.added
    assert (wanted.added > 0) == (settings["policy"] == "expanded_drop")
    logits = {s: rows for each in found for s, rows in each.logits.items()}
    assert logits.keys() == wanted.logits.keys()
    for s, rows in logits.items():
        torch.testing.assert_close(rows, wanted.logits[s], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in SCORES],
)
def test_on_one_rank_policies_keep_and_weigh_as_a_plain_rule_does(
    name: str, paths: Any, one_rank: Topology
) -> None:
    model = load_model(make_config(paths(name), implementation="transformers"), one_rank)
    for settings in policies_of(name):
        check(name, paths(name), settings, [served(one_rank, model, settings)])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.long
def test_on_two_ranks_policies_keep_and_weigh_as_a_plain_rule_does(name: str, paths: Any) -> None:
    settings = policies_of(name)
    ranks = run_ranks(served_on_ranks, 2, paths(name), settings, timeout=120)
    for each, found in zip(settings, zip(*ranks, strict=True), strict=True):
        check(name, paths(name), each, list(found))


def test_extras_and_drops_that_cannot_bind_leave_the_logits_bit_for_bit(
    paths: Any, one_rank: Topology
) -> None:
    model = load_model(make_config(paths("solar-open")), one_rank)
    dropless, *others = (
        served(one_rank, model, settings)
        for settings in (
            {"policy": "none"},
            {"policy": "expanded_drop", "factor": "inf"},
            {"policy": "token_drop", "factor": "3"},
        )
    )
    for ran in others:
        assert ran.dropped == ran.added == 0
        assert all(torch.equal(rows, dropless.logits[s]) for s, rows in ran.logits.items())


@pytest.mark.parametrize("policy", ["token_drop", "expanded_drop"])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.long
def test_families_of_the_engine_drop_the_same_in_both_implementations(
    name: str, policy: str, paths: Any
) -> None:
    capacity = {"policy": policy, "factor": "0.6", "phases": ("prefill", "decode")}
    # Without windows that are alike at other positions, as of counted-up tokens: there scores tie,
    # and the rounding of each implementation decides.
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(97, (6 + 3 * n,), generator=generator).tolist() for n in range(5)]
    for ranks in (1, 2):
        ours, theirs = (
            run_ranks(
                job, ranks, paths(name), 96, capacity, implementation, 256, prompts, timeout=120
            )
            for implementation in ("lockstep", "transformers")
        )
        assert [found.pop("ranked by") for found in theirs] == ["scores"] * ranks
        assert [found.pop("ranked by") for found in ours] == [None] * ranks
        assert ours == theirs
        assert ours[0]["dropped"] > 0


def test_expanded_drop_is_refused_by_model_type_where_the_router_gives_no_scores(
    paths: Any, one_rank: Topology
) -> None:
    path = paths("phimoe")
    moe = MoEConfig(capacity=CapacityConfig(policy="expanded_drop", factor="1.0"))
    config = Config(model=ModelConfig(path=str(path)), moe=moe)
    said = (
        "moe.capacity.policy = expanded_drop: the router of model_type 'phimoe', .*use token_drop"
    )
    with pytest.raises(ValueError, match=said):
        build_model(read_config(path), config, one_rank, one_rank.device, torch.float32)


def test_which_scores_a_model_has_is_said_in_words(paths: Any) -> None:
    assert scores_of(read_config(paths("granitemoe"))) == (
        "scores of all experts: token_drop and expanded_drop, by score"
    )
    assert scores_of(read_config(paths("phimoe"))) == (
        "combine weights of the chosen experts alone: token_drop, by combine weight; no "
        "expanded_drop"
    )
