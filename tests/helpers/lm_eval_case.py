"""lm-evaluation-harness in tests: skipped where it is missing, and the engine on one rank."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine.config.loader import load_config
from engine.interop.lm_eval_ranks import EvaluationRanks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed (make setup LOCKSTEP_EXTRAS=dev,eval)",
)


@contextmanager
def lockstep_lm(checkpoint: str, *overrides: str) -> Iterator[Any]:
    """The engine on one rank as a model of the harness, on a bundled checkpoint."""
    from engine.interop.lm_eval import LockstepLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ranks = EvaluationRanks(
        load_config("tiny_mixtral", [f"model.path=configs/checkpoints/{checkpoint}", *overrides])
    )
    try:
        with ranks.driving():
            ranks.use(ranks.config)
            yield LockstepLM(ranks)
    finally:
        ranks.close()


def instance(kind: str, *arguments: Any) -> Any:
    """One request of the harness."""
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # pyright: ignore


def results_of(model: Any, names: list[str], **options: Any) -> dict[str, Any]:
    """The harness's results on bundled tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from engine.interop.lm_eval_tasks import task_config

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    manager = TaskManager(include_defaults=False)
    tasks = [task_config(name) for name in names]
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options)
    assert found is not None
    return found  # pyright: ignore
