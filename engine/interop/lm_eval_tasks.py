"""The bundled evaluation texts as tasks of lm-evaluation-harness, which need no network.

    lockstep_recall, _sum, _brackets, _copy  the greedy answer is exactly right, as in
                                             `tools/capacity_report.py`
    lockstep_recall_choice                   of the words in the question the right one is likeliest
    lockstep_text                            perplexity of source code
    lockstep                                 all of them

They are what the checkpoints in configs/checkpoints were trained for; any model can run them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config.loader import PROJECT_ROOT

DATA = PROJECT_ROOT / "configs" / "checkpoints" / "tiny_mixtral" / "eval"
GROUP = "lockstep"
_ANSWERED = ("recall", "sum", "brackets", "copy")
_MOST_NEW_TOKENS = 24  # the longest answer has 17, its end included
_ACCURACY = {"aggregation": "mean", "higher_is_better": True}
_PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")

NAMES = (*(f"{GROUP}_{task}" for task in _ANSWERED), f"{GROUP}_recall_choice", f"{GROUP}_text")


def task_config(name: str, data: Path = DATA) -> dict[str, Any]:
    """Return the harness's config of one bundled task.

    Args:
        name: of `NAMES`.
        data: folder of tasks.jsonl and validation.jsonl.
    """
    assert name in NAMES, name
    common = {"task": name, "test_split": "test", "num_fewshot": 0, "target_delimiter": ""}
    kind = name.removeprefix(f"{GROUP}_")
    if kind == "text":
        return {
            **common,
            "custom_dataset": _dataset(data / "validation.jsonl", lambda row: True),
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": _prompt,
            "metric_list": [
                {"metric": metric, "aggregation": _aggregation(metric), "higher_is_better": False}
                for metric in _PERPLEXITIES
            ],
        }
    task = kind.removesuffix("_choice")
    common["custom_dataset"] = _dataset(data / "tasks.jsonl", lambda row: row["task"] == task)
    common["doc_to_text"] = _prompt
    if kind != task:
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_choice": recall_choices,
            "doc_to_target": lambda row: recall_choices(row).index(row["answer"]),
            "metric_list": [{"metric": "acc", **_ACCURACY}],
        }
    return {
        **common,
        "output_type": "generate_until",
        "doc_to_target": lambda row: row["answer"],
        "generation_kwargs": {
            "until": [],
            "max_gen_toks": _MOST_NEW_TOKENS,
            "do_sample": False,
            "temperature": 0.0,
        },
        "metric_list": [{"metric": "exact_match", **_ACCURACY}],
    }


def recall_choices(row: dict[str, str]) -> list[str]:
    """Return the second words of all pairs of a question: "recall: hat flag, ring hair? hat"."""
    pairs = row["prompt"].removeprefix("recall: ").partition("?")[0].split(", ")
    return [f" {pair.split()[1]}" for pair in pairs]


def _prompt(row: dict[str, str]) -> str:
    return row["prompt"]


def _aggregation(metric: str) -> str:
    return "bits_per_byte" if metric == "bits_per_byte" else "weighted_perplexity"


def _dataset(path: Path, keep: Callable[[dict[str, str]], bool]) -> Callable[..., dict[str, Any]]:
    """Return the function that makes a dataset of some rows of a JSONL file."""

    def make(**unused: Any) -> dict[str, Any]:
        from datasets import Dataset  # pyright: ignore[reportMissingImports]

        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {"test": Dataset.from_list([row for row in rows if keep(row)])}

    return make
