"""Scores of lm-evaluation-harness on the engine, with any config, and what capacity costs them.

    torchrun --nproc-per-node 4 tools/evaluate.py --config tiny_mixtral --tasks lockstep
    torchrun --nproc-per-node 4 tools/evaluate.py --config tiny_mixtral --tasks lockstep \\
        --set moe.capacity.policy=token_drop --set moe.capacity.scope=rank \\
        --sweep moe.capacity.factor=inf,2,1.5,1 --out DIR

Prints one table: every metric of every task with its standard error, the share of assignments that
capacity dropped, and the speed bound of the MoE layers; then one JSON line. --sweep runs the tasks
under one value of a setting after another. The bundled tasks need no network. docs/evaluation.md
has the rules.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# A checkout needs no install: engine and lockstep are found here.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.cases import Case, make_cases
from evaluation.report import make_folder
from evaluation.tasks import check_installed, load_tasks
from lockstep import cli

from engine.config.preflight import check_runnable
from engine.config.world_rules import validate_world


def make_parser() -> cli.CommandParser:
    """Return the parser of the command line."""
    parser = cli.CommandParser(prog="evaluate.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a YAML file, or in configs/"
    )
    parser.add_argument(
        "--tasks",
        type=_names,
        required=True,
        metavar="NAME,NAME",
        help="tasks, groups, tags or patterns of the harness, YAML files, or lockstep: the bundled",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting of the config; any number of times",
    )
    parser.add_argument("--sweep", metavar="KEY=V,V", help="run once for each value of a setting")
    parser.add_argument("--limit", type=_limit, metavar="N", help="questions per task, or a share")
    parser.add_argument(
        "--num-fewshot", type=_num_examples, metavar="N", help="examples before a question"
    )
    parser.add_argument("--gen-kwargs", metavar="K=V,K=V", help="over the tasks' own settings")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="ask through the tokenizer's template"
    )
    parser.add_argument("--system-instruction", metavar="TEXT", help="put it before each question")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="further tasks in YAML")
    parser.add_argument("--confirm-run-unsafe-code", action="store_true", help="of a task")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for text and JSON")
    parser.add_argument("--verbose", action="store_true", help="the harness's own messages")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.set_defaults(prepare=prepare)
    return parser


def prepare(options: argparse.Namespace, rank: int) -> Callable[[], None]:
    """Check what this rank can check alone; return what all ranks then run together.

    Raises:
        ValueError: a missing package, a wrong command line or config.
    """
    check_installed()
    if options.include_path is not None and not options.include_path.is_dir():
        raise ValueError(f"--include-path {options.include_path}: no such folder")
    cases = make_cases(options.config, options.set, options.sweep)
    for case in cases:
        check_runnable(case.config, os.environ)
    return partial(run, options, cases)


def run(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Evaluate all cases. Collective over the world."""
    from engine.batch.run import JobFailed
    from engine.interop.lm_eval_ranks import DriverFailed, EvaluationRanks

    ranks = EvaluationRanks(cases[0].config)
    try:
        with ranks.driving() as is_driver:
            if is_driver:
                evaluate(ranks, options, cases)
    except DriverFailed as error:
        raise JobFailed("") from error  # rank 0 has printed it
    ranks.close()


def evaluate(ranks: Any, options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Run all cases and print the report. Rank 0 only."""
    from bench.environment_record import environment_record
    from bench.report import emit
    from evaluation.report import Result, report_text
    from evaluation.scores import read_scores
    from lm_eval import simple_evaluate

    from engine.interop.lm_eval import LockstepLM

    # Before the first case runs, which may take hours.
    for case in cases:
        validate_world(case.config, ranks.num_ranks)
    if options.out is not None:
        make_folder(options.out)
    logging.getLogger("lm_eval").setLevel(logging.INFO if options.verbose else logging.ERROR)
    manager, tasks = load_tasks(options.tasks, options.include_path)
    results = []
    for case in cases:
        began = time.monotonic()
        ranks.use(case.config)
        found = simple_evaluate(
            model=LockstepLM(ranks),
            tasks=tasks,
            task_manager=manager,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            gen_kwargs=options.gen_kwargs,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
        scores, seconds = read_scores(found or {}), time.monotonic() - began
        results.append(Result(case.value, scores, ranks.usage, seconds))
    key = None if options.sweep is None else options.sweep.partition("=")[0]
    size = ranks.num_ranks
    head = f"{options.config}, {size} {'rank' if size == 1 else 'ranks'}"
    record = {
        "bench": "evaluate",
        **environment_record(("torch", "transformers", "lm_eval")),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name not in ("out", "prepare", "local_rank")
        },
        "ranks": size,
        "sweep": key,
        "cases": [result.record() for result in results],
    }
    emit(report_text(head, key, results), record, options.out, "evaluate")


def _names(text: str) -> list[str]:
    if not all(names := [name.strip() for name in text.split(",")]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be names of tasks, NAME,NAME")
    return names


def _num_examples(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 0")
    return int(text)


def _limit(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, or a share below 1")
    return int(value) if value >= 1 else value


if __name__ == "__main__":
    cli.run_and_exit(parser=make_parser())
