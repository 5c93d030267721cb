"""The parts of the evaluation: cases, scores, table, bundled tasks; and the whole, on two ranks.

Run: pytest tests/tools/test_evaluate.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from math import exp, log, sqrt
from pathlib import Path

import evaluate
import pytest
from evaluation.cases import make_cases, split_values
from evaluation.report import Result, report_text
from evaluation.scores import Score, ratio_error, read_scores
from evaluation.tasks import check_installed

from engine.interop.lm_eval_tasks import DATA, NAMES, recall_choices, task_config
from engine.interop.lm_eval_usage import Usage
from tests.helpers.lm_eval_case import needs_lm_eval

ROOT = Path(__file__).resolve().parents[2]
DROP = ["moe.capacity.policy=token_drop"]


def test_a_sweep_makes_one_config_for_each_value_as_it_is_written():
    cases = make_cases("tiny_mixtral", DROP, "moe.capacity.factor=inf,2,1.10")
    assert [case.value for case in cases] == ["inf", "2", "1.10"]
    assert [str(case.config.moe.capacity.factor) for case in cases] == ["inf", "2", "1.10"]
    assert [case.value for case in make_cases("tiny_mixtral", [], None)] == [None]


def test_commas_in_brackets_do_not_part_values():
    assert split_values("[prefill],[prefill,decode], none") == [
        "[prefill]",
        "[prefill,decode]",
        "none",
    ]


@pytest.mark.parametrize(
    "sweep, says",
    [
        ("moe.capacity.factor", "must be KEY=VALUE,VALUE"),
        ("moe.capacity.factor=1,,2", "must be KEY=VALUE,VALUE"),
        ("moe.capacity.factor=1,1", "gives a value twice"),
        ("moe.capacity.factr=1", "factr"),
        ("moe.capacity.factor=1,two", "two"),
    ],
)
def test_a_wrong_sweep_is_named(sweep, says):
    with pytest.raises(ValueError, match=says):
        make_cases("tiny_mixtral", DROP, sweep)


def test_sweeping_capacity_without_a_policy_is_refused():
    with pytest.raises(ValueError, match="add --set moe.capacity.policy=token_drop"):
        make_cases("tiny_mixtral", [], "moe.capacity.factor=2,1")


def test_the_error_of_a_perplexity_is_that_of_a_ratio():
    # R = -6 / 6 = -1; residuals -2 - (-2) = 0, -1 - (-1) = 0, -3 - (-3) = 0: no spread.
    assert ratio_error("bits_per_byte", [(-2.0, 2), (-1.0, 1), (-3.0, 3)]) == 0
    # R = -6 / 4; residuals 1 and -1: sqrt((1 + 1) * 2 / 1) / 4 = 0.5.
    samples = [(-2.0, 2), (-4.0, 2)]
    assert ratio_error("bits_per_byte", samples) == pytest.approx(0.5 / log(2))
    assert ratio_error("byte_perplexity", samples) == pytest.approx(0.5 * exp(1.5))
    assert ratio_error("bleu", samples) is None
    assert ratio_error("word_perplexity", samples[:1]) is None


def test_the_error_of_many_equal_texts_shrinks_with_the_root_of_their_number():
    samples = [(-2.0, 2), (-4.0, 2)]
    few, many = (ratio_error("bits_per_byte", samples * count) for count in (50, 200))
    assert few / many == pytest.approx(2, rel=0.01)


def test_scores_are_read_with_their_filters_and_errors():
    values = {"alias": "gsm", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25}
    values |= {"em_stderr,strict": "N/A", "sample_len": 8}
    assert read_scores({"results": {"gsm": values}}) == [
        Score("gsm", "acc", 0.5, 0.1),
        Score("gsm", "em (strict)", 0.25, None),
    ]


def test_the_table_has_a_column_for_every_value_and_the_rows_of_the_layers():
    usage = Usage(assignments=200, dropped=20, mean=30, slowest=45, slowest_after=36)
    scores = [Score("a", "acc", 0.75, 0.01), Score("a", "em", 0.5, None)]
    results = [Result("inf", scores, Usage(), 1.0), Result("1", scores, usage, 1.0)]
    lines = report_text("x, 4 ranks", "moe.capacity.factor", results).splitlines()
    assert lines[0] == "x, 4 ranks; moe.capacity.factor ="
    assert lines[1].split() == ["task", "metric", "inf", "+-", "1", "+-"]
    assert lines[3].split() == ["a", "acc", "0.7500", "0.0100", "0.7500", "0.0100"]
    assert lines[4].split() == ["em", "0.5000", "-", "0.5000", "-"]
    assert lines[5].split() == ["MoE", "layers", "dropped", "0.0%", "10.0%"]
    assert lines[6].split() == ["speed", "bound", "1.00", "1.25"]
    assert lines[7].split() == ["mean/slowest", "1.00", "0.83"]
    assert results[1].record()["drop_rate"] == 0.1
    assert sqrt(results[1].record()["speed_bound"] - 1) == 0.5


def test_the_choices_of_a_question_are_its_second_words():
    rows = [json.loads(line) for line in (DATA / "tasks.jsonl").read_text().splitlines()]
    assert recall_choices(rows[0])[:2] == [" dress", " tiger"]
    for row in rows:
        if row["task"] == "recall":
            assert recall_choices(row).count(row["answer"]) == 1


def test_where_the_harness_is_missing_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed; install it with: pip install 'lm-eval"):
        check_installed()


@needs_lm_eval
def test_every_bundled_task_has_its_questions():
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_defaults=False).load([task_config(name) for name in NAMES])["tasks"]
    sizes = {name: len(list(task.eval_docs)) for name, task in tasks.items()}
    assert sizes == {name: 95 if name.endswith("text") else 200 for name in NAMES}


@needs_lm_eval
@pytest.mark.long
def test_a_sweep_on_two_ranks_ends_in_one_table_and_one_json_line(tmp_path):
    result = evaluate_on_2_ranks(
        "--tasks=lockstep_recall,lockstep_recall_choice",
        "--limit=4",
        "--set=moe.capacity.policy=token_drop",
        "--sweep=moe.capacity.factor=inf,0.25",
        f"--out={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    whole, dropped = record["cases"]
    assert whole["scores"]["lockstep_recall"]["exact_match"]["value"] == 1.0
    assert whole["dropped"] == 0 and dropped["drop_rate"] > 0.3
    assert dropped["scores"]["lockstep_recall"]["exact_match"]["value"] < 1.0
    assert json.loads((tmp_path / "evaluate.json").read_text()) == record
    assert "speed bound" in (tmp_path / "evaluate.txt").read_text()


@needs_lm_eval
@pytest.mark.long  # the harness indexes thousands of tasks of its own
def test_an_unknown_task_is_reported_once_and_no_rank_waits():
    result = evaluate_on_2_ranks("--tasks=lockstep_recal,lockstep_sum")
    assert result.returncode != 0
    assert result.stderr.count("error: --tasks lockstep_recal: no such task, group or tag") >= 1
    assert "did you mean lockstep_recall?" in result.stderr


@needs_lm_eval
def test_what_a_later_case_or_the_end_would_refuse_is_refused_before_the_first_case(tmp_path):
    (tmp_path / "file").write_text("")
    cases = make_cases("tiny_mixtral", [], "parallel.expert=1,7")
    options = parsed()
    with pytest.raises(ValueError, match=r"parallel\.expert = 7: must divide the number of ranks"):
        evaluate.evaluate(Ranks(), options, cases)
    options = parsed(f"--out={tmp_path / 'file'}")
    with pytest.raises(ValueError, match="--out .*file: cannot be made: File exists"):
        evaluate.evaluate(Ranks(), options, cases[:1])


@pytest.mark.parametrize("option", ["num-fewshot=-1", "num-fewshot=x", "limit=x", "limit=inf"])
def test_a_number_of_questions_or_examples_that_is_none_is_refused(option):
    with pytest.raises(ValueError, match="must be a whole number"):
        parsed(f"--{option}")


class Ranks:
    """One rank that runs nothing."""

    num_ranks = 1


def parsed(*arguments: str) -> argparse.Namespace:
    required = ["--config=tiny_mixtral", "--tasks=lockstep_sum"]
    return evaluate.make_parser().parse_args([*required, *arguments])


def evaluate_on_2_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tools/evaluate.py", "--config=tiny_mixtral", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
