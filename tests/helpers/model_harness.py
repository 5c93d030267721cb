"""Run a `CausalLM` step by step, as `Runner` does, with a schedule that the test chooses.

A schedule is a list of steps, a step a list of pieces (sequence, start, length). Sequences belong
to data ranks in turn; a rank runs its own pieces and an empty step where it has none.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.generation.quantization import resolve_quantization
from engine.layers.kv_cache import KVCache
from engine.layers.step_inputs import Queries, ReadRows, StepTensors
from engine.models.language_model import LanguageModel
from engine.models.registry import build_model, read_config, read_spec
from engine.weights.formats.grouping import read_weights
from engine.weights.loader import load_weights

BLOCK_SIZE = 4

Piece = tuple[int, int, int]
Schedule = list[list[Piece]]


def whole(lengths: Sequence[int]) -> Schedule:
    """Every sequence in one step."""
    return [[(s, 0, n) for s, n in enumerate(lengths)]]


def chunked(lengths: Sequence[int]) -> Schedule:
    """Chunks of three tokens; sequence s joins in step s, so a step mixes chunks of all kinds."""
    steps: Schedule = [[] for _ in range(len(lengths) + max(lengths))]
    for s, n in enumerate(lengths):
        for i, start in enumerate(range(0, n, 3)):
            steps[s + i].append((s, start, min(3, n - start)))
    return [step for step in steps if step]


def one_by_one(lengths: Sequence[int]) -> Schedule:
    """The first token of every sequence, then one token per step until each has ended."""
    return [[(s, i, 1) for s, n in enumerate(lengths) if i < n] for i in range(max(lengths))]


def make_config(
    path: Path, quantization: Any = "dequantize", implementation: Any = "auto", **parallel: Any
) -> Config:
    model = ModelConfig(
        path=str(path), dtype="float32", quantization=quantization, implementation=implementation
    )
    return Config(
        model=model,
        parallel=ParallelConfig(**parallel),
        runtime=RuntimeConfig(device="cpu", timeout_s=30.0, threads=1),
    )


def load_model(
    config: Config, topology: Topology, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Build this rank's share of a checkpoint, its weights in dtype, and fill it."""
    implementation = config.model.implementation
    hf_config = read_config(Path(config.model.path), implementation)
    spec = read_spec(hf_config, implementation)
    held = resolve_quantization(config, spec, topology.device, dtype)
    layouts = held.layouts
    model = build_model(hf_config, config, topology, topology.device, dtype, layouts=layouts)
    names = read_weights(Path(config.model.path)).entries.keys()
    load_weights(
        config.model.path,
        model.weight_slots(names),
        ignored=model.ignored_weights(names),
        group=topology.control,
    )
    model.finalize_weights()
    return model


@torch.inference_mode()
def run_schedule(
    model: LanguageModel,
    topology: Topology,
    sequences: list[list[int]],
    schedule: Schedule,
    last: int | None = None,
) -> dict[int, torch.Tensor]:
    """Run a schedule; return the logits [tokens, V] of each sequence this rank owns.

    last: how many last tokens per sequence have their logits read; None: all.
    """
    mine = set(range(topology.data_rank, len(sequences), topology.num_data))
    needed = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
    numbers = list(range(sum(needed)))
    random.Random(0).shuffle(numbers)
    tables = [[numbers.pop() for _ in range(count)] for count in needed]
    spec, state_rows = model.kv_spec, None
    if spec.has_states:  # not in the order of the sequences
        state_rows = list(range(len(sequences)))[::-1]
    cache = KVCache(
        spec, sum(needed), BLOCK_SIZE, topology.device, model.dtype, num_sequences=len(sequences)
    )
    logits: dict[int, list[torch.Tensor]] = {s: [] for s in mine}
    for step in schedule:
        pieces = sorted((p for p in step if p[0] in mine), key=lambda p: p[2] != 1 or p[1] == 0)
        reads = [
            length if last is None else min(length, max(0, b + length - len(sequences[s]) + last))
            for s, b, length in pieces
        ]
        hidden_RD = model(build_step(pieces, sequences, tables, reads, state_rows), cache)
        assert hidden_RD.shape[0] == sum(reads)
        rows = model.logits(hidden_RD).split(reads)
        for (s, _, _), part in zip(pieces, rows, strict=True):
            logits[s].append(part)
    return {s: torch.cat(parts) for s, parts in logits.items()}


def build_step(
    pieces: list[Piece],
    sequences: list[list[int]],
    tables: list[list[int]],
    reads: list[int],
    state_rows: list[int] | None = None,
) -> StepTensors:
    """Flatten pieces, decodes first, into the model's input.

    Args:
        reads: how many of each are read.
        state_rows: of each sequence, where the model has recurrent states.
    """
    tokens, positions, slots, start = [], [], [], [0]
    for s, begin, length in pieces:
        span = range(begin, begin + length)
        tokens += sequences[s][begin : begin + length]
        positions += span
        slots += [tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
        start.append(start[-1] + length)
    context = [begin + length for _, begin, length in pieces]
    width = max((len(tables[s]) for s, _, _ in pieces), default=0)
    some = [i for i, count in enumerate(reads) if count]
    rows_S = None
    if state_rows is not None:
        rows_S = torch.tensor([state_rows[s] for s, _, _ in pieces], dtype=torch.int64)
    ends = [range(start[i + 1] - reads[i], start[i + 1]) for i in some]

    def queries(of: list[int], lens: list[int], states_S: torch.Tensor | None = None) -> Queries:
        padded = [tables[s] + [0] * (width - len(tables[s])) for s, _, _ in (pieces[i] for i in of)]
        return Queries(
            query_start_S1=torch.tensor([0, *lens]).cumsum(0).int(),
            query_lens=lens,
            context_lens=[context[i] for i in of],
            context_lens_S=torch.tensor([context[i] for i in of], dtype=torch.int32),
            block_table_SB=torch.tensor(padded, dtype=torch.int32).view(len(of), width),
            states_S=states_S,
        )

    read = ReadRows(
        rows_R=torch.tensor([row for rows in ends for row in rows], dtype=torch.int64),
        queries=queries(some, [reads[i] for i in some]),
    )
    return StepTensors(
        token_ids_T=torch.tensor(tokens, dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        slots_T=torch.tensor(slots, dtype=torch.int64),
        queries=queries(list(range(len(pieces))), [length for _, _, length in pieces], rows_S),
        read=None if sum(reads) == len(tokens) else read,
    )


def logits_on_this_rank(
    rank: int,
    path: Path,
    sequences: list[list[int]],
    schedules: dict[str, Schedule],
    parallel: dict[str, int],
    last: int,
    dtype: torch.dtype = torch.float32,
    quantization: str = "dequantize",
    implementation: str = "auto",
) -> dict[tuple[str, int | None], dict[int, torch.Tensor]]:
    """Load the checkpoint and run every schedule; return this rank's logits, of all tokens and of
    the `last` ones.
    """
    config = make_config(path, quantization, implementation, **parallel)
    topology = bootstrap.start(config, os.environ)
    model = load_model(config, topology, dtype)
    found = {
        (name, read): run_schedule(model, topology, sequences, schedule, read)
        for name, schedule in schedules.items()
        for read in (None, last)
    }
    bootstrap.stop(topology)
    return found
