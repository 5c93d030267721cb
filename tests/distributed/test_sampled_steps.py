"""profiler.every on two ranks: what is stamped in which step, and what the reports make of it.

Run: pytest tests/distributed/test_sampled_steps.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ModelConfig, ProfilerConfig, SchedulerConfig
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.profiling.device_clocks import HostClock
from engine.profiling.phase_clock import Phase, Spans
from engine.request import Request, SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

EVERY, NEW = 5, 18
PHASES = (Phase.ATTENTION, Phase.GATE, Phase.PLAN, Phase.EXPERTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    make_checkpoint("mixtral", path)
    return path


def run(rank: int, path: Path, folder: Path, every: int | str) -> dict[str, Any]:
    """Two runs of one engine, the second one measured: its steps, stamps and report."""
    llm = LLM(
        Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4),
            profiler=ProfilerConfig(every=every, spans=str(folder)),  # pyright: ignore
        )
    )
    clock, steps, stamps = llm._telemetry.clock, [], [0]
    assert isinstance(clock, HostClock)
    read, stamp, close_step = clock.read, clock._stamp, clock.close_step
    record_arrival = clock.record_arrival

    def keep(*, ended: bool = False) -> Spans | None:
        found = read(ended=ended)
        if found is not None:
            steps.append(found)
        return found

    def count() -> int:
        stamps[-1] += 1
        return stamp()

    def overlap() -> int:
        stamps[-1] -= 1  # a collective that other work overlaps has one stamp more
        return record_arrival()

    def close() -> None:
        close_step()
        stamps.append(0)

    patch = pytest.MonkeyPatch()
    patch.setattr(clock, "read", keep)
    patch.setattr(clock, "_stamp", count)
    patch.setattr(clock, "close_step", close)
    patch.setattr(clock, "record_arrival", overlap)
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    completions = []
    for number in range(2):
        steps.clear()
        stamps[:] = [0]
        requests = [
            Request(index=index, id=index, prompt_token_ids=[5, 6, 7 + index], params=params)
            for index in range(1 + number)
        ]
        completions.clear()
        llm.run(ListSource(requests if rank == 0 else []), completions.extend)
    found = {
        "report": llm.report,
        "layers": llm.model.num_layers,
        "complete": [each.complete for each in steps],
        "lengths": sum(int(each.ends[-1] - each.starts[0]) for each in steps) * 1e-9,
        "marks": [len(each.phases) for each in steps],
        "collectives": [len(each.arrivals) for each in steps],
        "stamped": stamps,
        "tokens": [each.token_ids for each in completions],
    }
    llm.close()
    return found


def test_sampled_steps_stamp_layers_and_collectives_and_reports_stay_whole(checkpoint, tmp_path):
    whole = run_ranks(run, 2, checkpoint, tmp_path / "whole", "auto", timeout=90)
    sampled = run_ranks(run, 2, checkpoint, tmp_path / "sampled", EVERY, timeout=90)
    assert whole[0]["tokens"] == sampled[0]["tokens"]
    layers = whole[0]["layers"]
    for rank, (other, found) in enumerate(zip(whole, sampled, strict=True)):
        assert all(other["complete"])
        steps = range(NEW + 1)  # the last one is the exchange that finds no more work
        complete = [step <= 2 or step % EVERY == 0 for step in steps]
        assert found["complete"] == complete, "by its number in the run, so alike on every rank"
        assert found["marks"] == other["marks"] and found["collectives"] == other["collectives"]
        collectives = 3 * layers
        for step in range(NEW):
            assert found["collectives"][step] == 1 + collectives
            # Per layer its collectives and its start; besides, a step's first, control and end.
            expected = collectives + layers + 3
            if complete[step]:
                expected = found["marks"][step] + 1
                assert expected > 9 * layers
            assert found["stamped"][step] == expected, f"step {step}"
        own = found["report"].ranks[rank]
        assert sum(own.seconds.values()) == pytest.approx(found["lengths"], rel=1e-6)
        assert own.resolved_settings["profiler.every"] == EVERY
        for phase in PHASES:
            mine, theirs = (
                each["report"].ranks[rank].phases[phase.name.lower()] for each in (found, other)
            )
            assert mine.seconds > 0
            assert (mine.tokens, mine.bytes_sent) == (theirs.tokens, theirs.bytes_sent)
    lines = [
        json.loads(line)
        for line in (tmp_path / "sampled" / "spans.rank00000.jsonl").read_text().splitlines()[1:]
    ]
    written = [line["step"] - 1 for line in lines]
    assert written == [step for step in range(NEW) if step <= 2 or step % EVERY == 0]
