"""Asynchronous scheduling through the whole engine: every completion is the synchronous one.

Run: pytest tests/distributed/test_async_llm.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import config_from_tree
from engine.generation.late.late_step import LateStep
from engine.generation.sampling import static_sampler
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

VOCAB = 97
PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3, 9, 26, 2])
]
# The ends of a request, in turn: by stop tokens in the middle, by length, at once, not at all.
ENDS: list[dict[str, Any]] = [
    {"stop_token_ids": tuple(range(0, VOCAB, 9))},
    {"max_new_tokens": 5},
    {"max_new_tokens": 1},
    {},
    {"stop_token_ids": tuple(range(3, VOCAB, 12)), "max_new_tokens": 24},
]
# The ways to choose: what the host has a part in drains the pipeline.
CHOICES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "sampled": [
        {},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_k": 9},
        {"temperature": 0.8, "top_p": 0.7},
    ],
    "mixed": [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {},
        {"repetition_penalty": 1.3, "temperature": 0.8},
        {"prompt_logprobs": True},
        {"n": 2, "temperature": 1.0},
        {"max_new_tokens": 0, "prompt_logprobs": True},
    ],
}


def sampling(kind: str) -> list[SamplingParams]:
    ways = CHOICES[kind]
    return [
        SamplingParams(
            **{"max_new_tokens": 16, "seed": i, **ENDS[i % len(ENDS)], **ways[i % len(ways)]}
        )
        for i in range(len(PROMPTS))
    ]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("async")
    for family in ("mixtral", "olmoe", "qwen3_next"):
        make_checkpoint(family, folder / family, overrides={"vocab_size": VOCAB})
    return {family: folder / family for family in ("mixtral", "olmoe", "qwen3_next")}


def generate(
    rank: int,
    path: Path,
    kind: str,
    settings: dict[str, dict[str, Any]],
    candidates: int | None = None,
    prompts: list[list[int]] = PROMPTS,
) -> dict[str, dict[str, Any]]:
    """Run one job with each setting; return what it gave.

    candidates: so few tokens are sorted on the device for top_p.
    """
    patch = pytest.MonkeyPatch()
    if candidates is not None:
        from engine.generation.late import late_step
        from engine.generation.sampling import sampler

        for module in (late_step, sampler, static_sampler):
            patch.setattr(module, "NUCLEUS_CANDIDATES", candidates)
    reads: list[int] = []
    read = LateStep.read

    def counted(self: LateStep) -> Any:
        outcome = read(self)
        reads.append(len(outcome[1]))
        return outcome

    patch.setattr(LateStep, "read", counted)
    found = {}
    for setting in ("off", "on"):
        reads.clear()
        tree: dict[str, Any] = {
            "model": {"path": str(path), "max_model_len": 64, "dtype": "float32"},
            "scheduler": {"kv_cache_blocks": 96, "block_size": 4, "max_batch_tokens": 24},
            "runtime": {"shared_memory": False, "timeout_s": 60.0},
        }
        for section, values in settings.items():
            tree[section] = {**tree.get(section, {}), **values}
        tree["scheduler"]["async_scheduling"] = setting
        llm = LLM(config_from_tree(tree))
        reports: list[Any] = []
        run = llm.run

        def noted(source: Any, sink: Any, _run: Any = run, _reports: Any = reports) -> Any:
            return _run(source, sink, _reports.append)

        llm.run = noted  # type: ignore[method-assign]
        done = llm.generate(prompts, sampling(kind))
        assert llm.report is not None
        own = llm.report.ranks[rank]
        found[setting] = {
            "records": [{**each.record(), "timing": None} for each in done],
            "tokens": [(each.tokens_prefill, each.tokens_decode) for each in llm.report.ranks],
            "surplus": sum(each.surplus_rows or 0 for each in llm.report.ranks),
            "run": sum(each.tokens_decode for each in reports),
            "preemptions": own.preemptions,
            "finished": reports[-1].finished,
            "late": len(reads),
            "wrong": sum(reads),
            "free": llm._scheduler.pool.num_free,
        }
        llm.close()
    patch.undo()
    return found


def check(results: list[dict[str, dict[str, Any]]]) -> None:
    for each in results:
        off, on = each["off"], each["on"]
        assert on["records"] == off["records"]
        if not off["preemptions"]:  # else what is computed again depends on the step
            assert on["tokens"] == off["tokens"]
        assert (off["surplus"], off["late"]) == (0, 0)
        assert on["run"] == off["run"] + on["surplus"], "rows that were of no use are named"
        assert on["finished"] <= off["finished"]
        assert on["free"] == off["free"]
    assert any(each["on"]["late"] for each in results)


CASES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", 1, "sampled", {}),
    "mixtral two ranks": ("mixtral", 2, "greedy", {}),
    "olmoe three ranks": ("olmoe", 3, "sampled", {}),
    "qwen3_next two ranks": ("qwen3_next", 2, "sampled", {}),
    "host data": ("olmoe", 2, "mixed", {}),
    "preemptions": ("mixtral", 1, "sampled", {"scheduler": {"kv_cache_blocks": 14}}),
    "few sequences": ("olmoe", 2, "greedy", {"scheduler": {"max_sequences": 2}}),
    "two_batch": ("olmoe", 2, "greedy", {"moe": {"overlap": {"two_batch": True}}}),
    "static": ("mixtral", 2, "sampled", {"moe": {"dispatch": {"exchange": "static"}}}),
}
LONG = {"qwen3_next two ranks", "static", "two_batch", "few sequences"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in CASES]
)
def test_completions_accounts_and_counts_are_those_of_the_synchronous_loop(checkpoints, name):
    family, world, kind, settings = CASES[name]
    results = run_ranks(generate, world, checkpoints[family], kind, settings, timeout=240)
    check(results)
    if name != "preemptions":
        assert any(each["on"]["surplus"] for each in results)
    else:
        assert all(each[way]["preemptions"] for each in results for way in ("off", "on"))


def test_a_token_that_the_device_could_not_choose_is_chosen_late_and_its_row_runs_again(
    checkpoints,
):
    results = run_ranks(generate, 2, checkpoints["mixtral"], "sampled", {}, 2, timeout=240)
    check(results)
    assert any(each["on"]["wrong"] for each in results)


def test_where_a_state_cannot_be_taken_back_such_a_step_is_read_at_once(checkpoints):
    results = run_ranks(generate, 1, checkpoints["qwen3_next"], "sampled", {}, 2, timeout=240)
    check(results)
    assert not any(each["on"]["wrong"] for each in results)


def test_prefixes_are_shared_as_ever(checkpoints):
    chance = random.Random(5)
    first = [chance.randrange(90) for _ in range(12)]
    prompts = [[*first, *range(number)] for number in range(len(PROMPTS))]
    args = (checkpoints["olmoe"], "greedy", {"scheduler": {"max_sequences": 3}}, None, prompts)
    results = run_ranks(generate, 2, *args, timeout=240)
    check(results)
    for each in results:
        cached = [record["usage"].get("cached_tokens", 0) for record in each["on"]["records"]]
        assert sum(map(bool, cached)) > len(prompts) // 2


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": {"tensor": 2}},
        {"moe": {"capacity": {"policy": "token_drop", "factor": 1.0}}},
    ],
)
def test_nothing_is_late_where_the_host_needs_the_tokens_at_once(checkpoints, settings):
    results = run_ranks(generate, 2, checkpoints["mixtral"], "greedy", settings, timeout=240)
    for each in results:
        assert each["on"]["late"] == 0
        assert each["on"]["records"] == each["off"]["records"]
