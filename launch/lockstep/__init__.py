"""Lockstep's Python face under the project's own name: `from lockstep import LLM, load_config`.

The code is the package `engine`; this one holds what an installation adds to it: the name, the
command (`python -m lockstep`, or `lockstep`), and in a wheel the bundled configs.
"""

from typing import TYPE_CHECKING, Any

import engine

if TYPE_CHECKING:
    from engine import LLM, Completion, SamplingParams, load_config

__all__ = ["LLM", "Completion", "SamplingParams", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    return getattr(engine, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
