"""Tasks of an evaluation: the bundled ones, the harness's, and those of a user's folder."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.interop.lm_eval_tasks import GROUP, NAMES, task_config


def check_installed() -> None:
    """Raise a ValueError that says how to install the harness where it is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "the package lm-eval is not installed; install it with: pip install "
            "'lm-eval>=0.4.13,<0.5', or Lockstep with its extra: pip install -e '.[eval]'"
        )


def load_tasks(names: Sequence[str], include: Path | None) -> tuple[Any, list[Any]]:
    """Return the harness's task manager, and the tasks and groups that the names mean.

    Args:
        names: of tasks, groups or tags, patterns of names, or YAML files.
        include: a folder of further YAML tasks.

    Raises:
        ValueError: a name that means nothing, or a task that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    wanted = [each for name in names for each in (NAMES if name == GROUP else (name,))]
    # Indexing the harness's own tasks takes many seconds.
    manager = TaskManager(
        include_path=None if include is None else str(include),
        include_defaults=not set(wanted) <= set(NAMES),
    )
    loaded = []
    for name in dict.fromkeys(wanted):
        for spec in _specs(name, manager):
            try:
                found = manager.load([spec])
            except Exception as error:  # of a task's own code, or a data set without a network
                raise ValueError(
                    f"--tasks {name}: cannot be loaded: {type(error).__name__}: {error}"
                ) from error
            loaded += found["groups"].values() or found["tasks"].values()
    return manager, loaded


def _specs(name: str, manager: Any) -> list[Any]:
    """Return what the manager loads for a name."""
    if name in NAMES:
        return [task_config(name)]
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise ValueError(f"--tasks {name}: no such file")
        return [name]
    if matches := manager.match_tasks([name]):
        return list(matches)
    near = difflib.get_close_matches(name, [GROUP, *NAMES, *manager.all_tasks], n=1)
    hint = f"did you mean {near[0]}?" if near else f"bundled are {GROUP}, {', '.join(NAMES)}"
    raise ValueError(f"--tasks {name}: no such task, group or tag; {hint}")
