"""A whole step of the engine: the host waits for the device only where the source says so.

CUDA's sync debug mode reports every call that waits. It is an error in all lines but those with a
`# SYNC:` comment on them or a few lines above, the rule of the emulated CUDA tests.
"""

from __future__ import annotations

import linecache
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench.candidate import REPOSITORY
from make_random_checkpoint import SIZES, make_checkpoint

from engine.config.loader import config_from_tree
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.request import Request, SamplingParams
from gpu_checks.check import Check, Settings, at_most, guarded, not_here

GROUP = "step"
_COMMENT_LINES = 4
_WAITS = "called a synchronizing CUDA operation"
_POLICIES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "token_drop gather": {"policy": "token_drop", "factor": "1", "selection": "gather"},
    "token_drop radix": {"policy": "token_drop", "factor": "1", "selection": "radix"},
    "expanded_drop": {"policy": "expanded_drop", "factor": "1"},
}
WARM_UP = 6  # steps in which kernels are compiled and tuned, which may wait


def check_step(settings: Settings) -> Iterator[Check]:
    """Check steps of prefill and decode under every policy."""
    if settings.device.type != "cuda":
        yield not_here(GROUP, "host waits", "a CPU is not waited for")
        if not settings.is_tiny:
            return
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        checkpoint = Path(folder)
        for family in ("mixtral", "deepseek_v2"):
            make_checkpoint(family, checkpoint / family)
        for family, policy in (*(("mixtral", each) for each in _POLICIES), ("deepseek_v2", None)):
            name = f"{family}, {policy or 'dropless'}"
            yield from guarded(
                GROUP,
                name,
                lambda f=family, p=policy, n=name: _check(
                    settings, checkpoint / f, _POLICIES[p or "dropless"], n
                ),
            )


def _check(
    settings: Settings, checkpoint: Path, capacity: dict[str, Any], name: str
) -> list[Check]:
    tree = {
        "model": {"path": str(checkpoint), "dtype": "bfloat16"},
        "moe": {
            "capacity": {**capacity, **({"phases": ["prefill", "decode"]} if capacity else {})}
        },
        "scheduler": {"kv_cache_blocks": 256, "max_batch_tokens": 64},
        "runtime": {"device": settings.device.type},
    }
    chance, vocab = random.Random(0), SIZES["tiny"].vocab
    count, new_tokens = (6, 8) if settings.is_tiny else (16, 16)
    requests = [
        Request(
            index=number,
            id=str(number),
            prompt_token_ids=[chance.randrange(vocab) for _ in range(20 + 3 * number)],
            params=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True),
        )
        for number in range(count)
    ]
    steps = 0
    llm = LLM(config_from_tree(tree))
    try:
        llm.run(ListSource(requests[:3]), lambda _: None)
        with host_waits() as places:

            def on_step(_: Any) -> None:
                nonlocal steps
                steps += 1
                if steps == WARM_UP:
                    places.clear()

            llm.run(ListSource(requests), lambda _: None, on_step)
    finally:
        llm.close()
    assert steps > WARM_UP, f"{steps} steps"
    unmarked = Counter({place: n for place, n in places.items() if not may_wait(*place)})
    note = ", ".join(f"{Path(path).name}:{line}" for path, line in unmarked)
    marked = f"{sum(places.values())} where it says so, {steps - WARM_UP} steps"
    return [at_most(GROUP, f"{name}: waits elsewhere", unmarked.total(), 0, note or marked)]


def may_wait(path: str, line: int) -> bool:
    """Return whether the source says that the host waits in this line."""
    lines = range(line - _COMMENT_LINES, line + 1)
    return any("# SYNC:" in linecache.getline(path, number) for number in lines)


@contextmanager
def host_waits() -> Iterator[Counter[tuple[str, int]]]:
    """Count the host's waits for the device in the block, by file and line of the engine."""
    found: Counter[tuple[str, int]] = Counter()
    engine = str(REPOSITORY / "engine")
    kernels = str(REPOSITORY / "kernels")

    def note(message: Any, *_args: Any, **_options: Any) -> None:
        if _WAITS not in str(message):
            return
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith((engine, kernels)):
            frame = frame.f_back
        if frame is not None:  # else it is this tool's own
            found[frame.f_code.co_filename, frame.f_lineno] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
        if mode is not None:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if mode is not None:
                torch.cuda.set_sync_debug_mode(mode)
