"""Lines that share prefixes: each prefix on one rank, and the records of a job in input order.

python -m pytest tests/distributed/test_shared_prefixes.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.request import SamplingParams
from tests.helpers.batch_case import committed, infer, infer_each, records, report, run
from tests.helpers.ranks import RanksFailed, run_ranks

PREFIXES, PER_PREFIX = 4, 6
NUM = PREFIXES * PER_PREFIX
SHARED = {"lines": NUM, "prefixes": PREFIXES}
LINE = "24 lines share 4 prefixes"
# What a request computes; how much of it was in the cache is another matter.
RESULT = ("id", "text", "token_ids", "logprobs", "finish_reason")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An input of 24 lines of equal length, 6 of each of 4 prefixes, mixed."""
    chance = random.Random(0)
    prefixes = [[chance.randint(100, 250) for _ in range(40)] for _ in range(PREFIXES)]
    order = [number % PREFIXES for number in range(NUM)]
    chance.shuffle(order)
    path = tmp_path_factory.mktemp("shared") / "in.jsonl"
    with path.open("w") as file:
        for number, prefix in enumerate(order):
            ids = [*prefixes[prefix], *(chance.randint(100, 250) for _ in range(4))]
            line = {"id": f"{prefix}-{number:02d}", "prompt_token_ids": ids, "max_new_tokens": 6}
            file.write(json.dumps({**line, "logprobs": True}) + "\n")
    return path


def command(job: Path, lines: Path, output: Path, *more: str) -> list[str]:
    files = ["--input", str(lines), "--output", str(output)]
    return ["--config", str(job / "config.yaml"), *files, *more]


def results(output: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in RESULT} for record in records(output)]


@pytest.fixture(scope="module")
def in_order(job: Path, lines: Path) -> list[dict[str, Any]]:
    """The results of the job in input order."""
    output = lines.with_name("in_order.jsonl")
    argv = command(job, lines, output, "--set", "scheduler.prefix_cache=false")
    ((code, out, err),) = run(1, argv)
    assert code == 0, err
    assert "prefix" not in out and "shared_prefixes" not in report(output)
    return results(output)


def infer_noting(rank: int, argv: list[str], folder: Path) -> tuple[int, str, str]:
    """Run infer.py and note the ids of the lines that this rank finishes, in order."""
    from engine.batch.ledger import ShardWriter

    append = ShardWriter.append

    def noting(self: ShardWriter, completions: Any) -> None:
        with (folder / f"rank-{rank}").open("a") as file:
            file.writelines(f"{completion.id}\n" for completion in completions)
        append(self, completions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "append", noting)
        return infer(rank, argv)


def test_each_prefix_runs_on_one_rank_and_the_records_are_those_of_input_order(
    job, lines, in_order, tmp_path
):
    output = tmp_path / "out.jsonl"
    argv = command(job, lines, output)
    (code, out, err), (other, _, other_err) = run_ranks(infer_noting, 2, argv, tmp_path)
    assert (code, other) == (0, 0), err + other_err
    assert results(output) == in_order
    ran = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(2)]
    held = [{name[0] for name in names} for names in ran]
    assert [len(names) for names in ran] == [NUM // 2] * 2
    assert [len(prefixes) for prefixes in held] == [2, 2] and not set.intersection(*held)
    for names in ran:
        own = [name[0] for name in names]
        assert own == sorted(own, key=own.index), "a prefix's lines run one after the other"
    shared = report(output)["shared_prefixes"]
    assert SHARED.items() <= shared.items() and 0.5 < shared["prompt_share"] < 1
    assert LINE in out and LINE in err


def test_a_dealt_job_that_is_killed_resumes_on_another_number_of_ranks(
    job, lines, in_order, tmp_path
):
    output = tmp_path / "out.jsonl"
    with pytest.raises(RanksFailed, match="rank 1: exited without a result, exit code -9"):
        run(2, command(job, lines, output), (1, 3, "kill after"))
    done = committed(output, 2)
    assert 0 < len(done) < NUM and not output.exists()
    ((code, _, err),) = run(1, command(job, lines, output))
    assert code == 0, err
    assert results(output) == in_order
    values = report(output)
    assert (values["resumed"], values["requests"]) == (len(done), NUM - len(done))


def test_dealt_slices_merge_into_the_records_of_input_order(job, lines, in_order, tmp_path):
    output = tmp_path / "out.jsonl"
    argvs = [command(job, lines, output, "--slice", f"{index}/2") for index in range(2)]
    for each in run_ranks(infer_each, 2, argvs, timeout=120.0):
        for code, _, err in each:
            assert code == 0, err
    assert results(output) == in_order
    assert [each["shared_prefixes"]["lines"] for each in report(output)["slices"]] == [12, 12]


def generate(rank: int, model: Path, prompts: list[list[int]]) -> list[Any]:
    """The prompts that this rank gets and all new tokens, without and with the prefix cache."""
    from engine.llm import LLM

    outcomes = []
    for prefix_cache in (False, True):
        config = Config(
            model=ModelConfig(path=str(model)),
            scheduler=SchedulerConfig(prefix_cache=prefix_cache),
            runtime=RuntimeConfig(device="cpu"),
        )
        llm, given = LLM(config), []
        run_source = llm.run

        def noting(source: Any, *rest: Any, given=given, run_source=run_source) -> Any:
            given += [request.index for request in source._remaining]
            return run_source(source, *rest)

        llm.run = noting
        done = llm.generate(prompts, SamplingParams(max_new_tokens=3, ignore_eos=True))
        llm.close()
        outcomes.append((given, [completion.token_ids for completion in done]))
    return outcomes


def test_generate_keeps_prompts_with_common_blocks_on_one_rank(job):
    prompts = [[100 + number // 4] * 20 + [number] for number in range(8)]
    (first, own), (other, others) = run_ranks(generate, 2, job / "model", prompts, timeout=120.0)
    assert [first[0], other[0]] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [own[0], others[0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert own[1] == first[1] == others[1] and len(own[1]) == 8
