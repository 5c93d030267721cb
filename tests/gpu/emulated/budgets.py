"""Budgets: kernels, events, host syncs and collectives of one step, per layer.

Each is counted by a rule, on two ranks of emulated CUDA with bfloat16 rows and grouped_mm: see
`tensors.py`. A layer is half of the difference between models of four and of two layers; a step is
that of the model of two, whose first layer is dense in DeepSeek's families. budgets.txt has the
numbers; this prints them, and for the rows that are named the lines of the source of a layer:

    python -m tests.gpu.emulated.budgets [ROW ...]
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config.loader import config_from_tree
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.models.model_types import Implementation
from engine.models.registry import read_config
from engine.moe.dispatch import chunk_layout, layout_policy
from engine.profiling import device_clocks
from engine.request import Request, SamplingParams
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.guard import compile_guard
from tests.gpu.emulated.runs import SCATTERED, Placed
from tests.helpers.ranks import run_ranks
from tools.gpu_checks.launches import COLUMNS
from tools.make_random_checkpoint import make_checkpoint

DEPTHS = (2, 4)
# The second step: of other prompts, or of their first new tokens. Later ones are much alike, so
# that a rank might receive none, and what it does not launch would be missing.
_SEQUENCES, _PROMPT, _STEP = 16, 48, 1


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    family: str
    moe: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # of the checkpoint's config.json
    is_prefill: bool = False
    placement: Placed | None = None
    quantization: str = "auto"
    implementation: Implementation = "auto"
    # Whether the first layer alone has keys, and all others are of linear attention.
    linear: bool = False
    graphs: bool = False  # whether decode steps are CUDA graphs
    # Whether its tokens feed back on the device, which adds to a step and to no layer.
    is_late: bool = False


_PLAIN = {"dispatch": {"deduplicate": False}}

# Every rank has all experts, so that rows move wherever ranks have unequal loads.
_COPIES = Placed(SCATTERED, tuple(range(8)))
_LOW_BIT = Placed(SCATTERED, tuple(range(8)), "int4")


_STATIC = {"dispatch": {"exchange": "static"}}
_SUMS = {"dispatch": {"exchange": "static", "partial_sums": True}}

_SYMMETRIC = {"dispatch": {"transport": "symmetric", "deduplicate": False}}


def _drop(policy: str, selection: str, **more: Any) -> dict[str, Any]:
    capacity = {"policy": policy, "factor": "1", "selection": selection, **more}
    return {"capacity": capacity, **_PLAIN}


ROWS = (
    Row("mixtral decode, one expert per rank", "mixtral", model={"num_local_experts": 2}),
    Row("mixtral decode, static, one expert", "mixtral", _STATIC, {"num_local_experts": 2}),
    Row("olmoe decode", "olmoe", _PLAIN),
    Row("olmoe decode, static", "olmoe", _STATIC),
    Row("qwen3_moe decode, static, partial sums", "qwen3_moe", _SUMS),
    Row("qwen3_moe decode, static, copies", "qwen3_moe", _STATIC, placement=_COPIES),
    Row("olmoe decode, graphs", "olmoe", graphs=True),
    Row("qwen2_moe decode", "qwen2_moe", _PLAIN),
    Row("qwen3_moe decode", "qwen3_moe", _PLAIN),
    Row("qwen3_moe decode, deduplicated", "qwen3_moe"),
    Row("qwen3_moe decode, fp8", "qwen3_moe", {"dispatch": {"dtype": "fp8"}}),
    Row("qwen3_moe decode, two chunks", "qwen3_moe", {"overlap": {"chunks": 2}}),
    Row("deepseek_v2 decode", "deepseek_v2", _PLAIN),
    Row("deepseek_v3 decode", "deepseek_v3", _PLAIN),
    Row("glm4_moe decode", "glm4_moe", _PLAIN),
    Row("qwen3_next decode, linear layers", "qwen3_next", _PLAIN, linear=True),
    *(
        Row(f"mixtral prefill, {policy} {selection}", "mixtral", _drop(policy, selection), {}, True)
        for policy in ("token_drop", "expanded_drop")
        for selection in ("gather", "radix")
    ),
    Row(
        "mixtral prefill, token_drop quota",
        "mixtral",
        _drop("token_drop", "auto", consensus="quota"),
        is_prefill=True,
    ),
    Row("qwen3_moe decode, scattered homes", "qwen3_moe", _PLAIN, placement=Placed(SCATTERED)),
    Row(
        "qwen3_moe decode, copies without rows",
        "qwen3_moe",
        {"copies": {"phases": ["prefill"]}, **_PLAIN},
        placement=_COPIES,
    ),
    Row("qwen3_moe decode, copies with rows", "qwen3_moe", _PLAIN, placement=_COPIES),
    Row("mixtral prefill", "mixtral", _PLAIN, {}, True),
    Row("mixtral prefill, symmetric", "mixtral", _SYMMETRIC, {}, True),
    Row("qwen3_moe decode, symmetric", "qwen3_moe", _SYMMETRIC),
    Row(
        "mixtral prefill, token_drop symmetric",
        "mixtral",
        {**_drop("token_drop", "gather"), **_SYMMETRIC},
        {},
        True,
    ),
    Row("mixtral prefill, copies with rows", "mixtral", _PLAIN, {}, True, _COPIES),
    Row(
        "mixtral prefill, token_drop with copies",
        "mixtral",
        {"capacity": {"policy": "token_drop", "factor": "1", "scope": "rank"}, **_PLAIN},
        {},
        True,
        _COPIES,
    ),
    # Without rows: how many experts' copies have some would change the count.
    Row(
        "mixtral prefill, int4 copies",
        "mixtral",
        {"copies": {"target": 0.01}, **_PLAIN},
        {},
        True,
        _LOW_BIT,
    ),
    Row("qwen3_moe decode, fp8 experts", "qwen3_moe", _PLAIN, quantization="fp8"),
    Row(
        "qwen3_moe decode, fp8 scaled_mm",
        "qwen3_moe",
        {"experts": {"backend": "scaled_mm"}, **_PLAIN},
        quantization="fp8",
    ),
    Row(
        "qwen3_moe decode, fp8 deep_gemm",
        "qwen3_moe",
        {"experts": {"backend": "deep_gemm"}, **_PLAIN},
        model={"hidden_size": 128, "moe_intermediate_size": 128},
        quantization="fp8",
    ),
    Row("gpt_oss decode, int4 experts", "gpt_oss", _PLAIN, quantization="int4"),
    Row("mixtral decode, by transformers", "mixtral", _PLAIN, implementation="transformers"),
    Row("granitemoe decode, by transformers", "granitemoe", _PLAIN),
    Row("olmoe decode, asynchronous", "olmoe", _PLAIN, is_late=True),
    Row("qwen3_moe decode, asynchronous", "qwen3_moe", _PLAIN, is_late=True),
    Row("olmoe decode, static, asynchronous", "olmoe", _STATIC, is_late=True),
)


@dataclass(frozen=True)
class Step:
    """What rank 0 counted in one step."""

    counts: Counter[str]  # by column
    lines: Counter[str]  # kernels, events and syncs by line of the source


def cells(steps: tuple[Step, Step]) -> list[float]:
    """Return the numbers of a row: of each column per layer, then per step."""
    shallow, deep = (step.counts for step in steps)
    layer = [(deep[each] - shallow[each]) / (DEPTHS[1] - DEPTHS[0]) for each in COLUMNS]
    return [*layer, *(shallow[each] for each in COLUMNS)]


def table_lines(found: dict[str, tuple[Step, Step]]) -> list[str]:
    """Return the lines of the table. found: steps of the two depths, by the row's name."""
    wide, titles = max(map(len, found)), [f"{each:>11}" for each in COLUMNS]
    lines = [f"# torch {torch.__version__.split('+')[0]}; per layer, then per step of two layers"]
    lines.append(f"# {'':{wide - 2}} | {' '.join(titles)} | {' '.join(titles)}")
    for name, steps in found.items():
        numbers = [f"{each:11g}" for each in cells(steps)]
        halves = (" ".join(numbers[: len(COLUMNS)]), " ".join(numbers[len(COLUMNS) :]))
        lines.append(f"{name:{wide}} | {halves[0]} | {halves[1]}")
    return lines


def per_layer(steps: tuple[Step, Step]) -> list[str]:
    """Return what a layer launches and waits for in each line of the source, the most first."""
    lines = Counter(steps[1].lines)
    lines.subtract(steps[0].lines)
    each = DEPTHS[1] - DEPTHS[0]
    return [f"{count / each:5g} {line}" for line, count in lines.most_common() if count]


def count_all(
    folder: Path, guard: Path, rows: Sequence[Row] = ROWS
) -> dict[str, tuple[Step, Step]]:
    """Count every row; return the steps of the two depths by the row's name."""
    paths: dict[tuple[str, int], Path] = {}
    for row in rows:
        for depth in DEPTHS:
            path = paths[row.name, depth] = folder / f"{row.name} {depth}".replace(" ", "_")
            settings = {"vocab_size": 97, "num_hidden_layers": depth, **row.model}
            if row.linear:
                kinds = ["full_attention"] + ["linear_attention"] * (depth - 1)
                settings["layer_types"] = kinds
            make_checkpoint(row.family, path, overrides=settings)
    return run_ranks(_count_rows, 2, guard, paths, rows, timeout=280)[0]


def _count_rows(
    rank: int, guard: Path, paths: dict[tuple[str, int], Path], rows: Sequence[Row]
) -> dict[str, tuple[Step, Step]]:
    os.environ["LOCKSTEP_NATIVE"] = "0"
    found = {}
    for row in rows:
        # Transformers' modules are imported before the emulation replaces types that they annotate.
        read_config(paths[row.name, DEPTHS[0]], row.implementation)
        shallow, deep = (_count(rank, guard, paths[row.name, depth], row) for depth in DEPTHS)
        found[row.name] = shallow, deep
    return found


def _count(rank: int, guard: Path, path: Path, row: Row) -> Step:
    """Run a few sequences; return what one step counted."""
    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard):
        patch.setattr(chunk_layout, "MIN_CHUNK_ROWS", 1)
        patch.setattr(layout_policy, "COLLECTIVE_BYTES", 1)
        # From the second step on as in the middle of a job, where most steps are not complete.
        patch.setattr(device_clocks, "WARM_UP", 0)
        steps: list[tuple[Step, Any]] = []

        def on_step(report: Any) -> None:
            counts = Counter(
                kernels=sum(DEVICE.kernels.values()),
                events=DEVICE.events,
                syncs=sum(DEVICE.syncs.values()),
                collectives=sum(DEVICE.collectives.values()),
            )
            steps.append((Step(counts, DEVICE.lines + DEVICE.syncs), report))
            DEVICE.reset_counts()

        llm = LLM(config_from_tree(_tree(rank, path, row)))
        DEVICE.reset_counts()
        llm.run(ListSource(_requests(rank, row)), lambda _: None, on_step)
        llm.close()
        step, report = steps[_STEP]
        assert bool(report.tokens_prefill) == row.is_prefill, "another step than was meant"
        assert not dist.is_initialized()
        return step


def _tree(rank: int, path: Path, row: Row) -> dict[str, Any]:
    moe = {"experts": {"backend": "grouped_mm"}, **row.moe}
    if row.quantization != "auto" and "experts" not in row.moe:
        moe["experts"] = {"backend": "auto"}
    if row.placement is not None:
        layers = tuple(range(json.loads((path / "config.json").read_text())["num_hidden_layers"]))
        placed = replace(row.placement, layers=layers)
        moe["placement"] = str(placed.write(path, rank))
    # In prefill a step is one prompt; for decode all prompts fit into the first step.
    tokens = _PROMPT if row.is_prefill else _PROMPT * _SEQUENCES
    return {
        "model": {
            "path": str(path),
            "max_model_len": 64,
            "dtype": "bfloat16",
            "quantization": row.quantization,
            "implementation": row.implementation,
        },
        "moe": moe,
        "scheduler": {
            "kv_cache_blocks": 256,
            "block_size": 4,
            "max_batch_tokens": tokens,
            "async_scheduling": "on" if row.is_late else "off",
        }
        | ({"max_sequences": _SEQUENCES} if row.graphs else {}),
        "runtime": {
            "device": "cuda",
            "timeout_s": 60.0,
            "graphs": "auto" if row.graphs else "off",
        },
    }


def _requests(rank: int, row: Row) -> list[Request]:
    chance = random.Random(rank)
    count = _STEP + 2 if row.is_prefill else _SEQUENCES
    params = SamplingParams(max_new_tokens=1 if row.is_prefill else _STEP + 2, ignore_eos=True)
    return [
        Request(
            index=2 * number + rank,
            id=str(number),
            prompt_token_ids=[chance.randrange(97) for _ in range(_PROMPT)],
            params=params,
        )
        for number in range(count)
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        steps = count_all(Path(name), compile_guard(Path(name)))
    print(*table_lines(steps), sep="\n")
    for row_name in sys.argv[1:]:
        print(row_name, *per_layer(steps[row_name]), sep="\n")
