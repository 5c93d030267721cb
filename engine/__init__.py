"""Lockstep: expert-parallel MoE inference whose slowest rank is known, and capped.

    from engine import LLM, SamplingParams, load_config

    llm = LLM(load_config("tiny_mixtral"))
    for completion in llm.generate(["def main():"], SamplingParams(max_new_tokens=32)):
        print(completion.text)

`import lockstep` offers the same names. `import engine` loads nothing else: each name is imported
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config.loader import load_config
    from engine.llm import LLM
    from engine.request import Completion, SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams", "load_config"]

_MODULE_OF = {
    "LLM": "engine.llm",
    "Completion": "engine.request",
    "SamplingParams": "engine.request",
    "load_config": "engine.config.loader",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
