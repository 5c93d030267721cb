"""Jobs of the real engine whose decode steps are graphs: what the same steps give without.

On the emulated device, with nothing set that graphs would need but a precision that the experts'
kernels take. Jobs without graphs are compared with the CPU's (`tests/gpu/emulated/test_engine.py`).

Run: pytest tests/gpu/emulated/graphs/test_graph_jobs.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import config_from_tree
from engine.generation.graphs.steps import GraphSteps
from engine.generation.late.late_step import LateStep
from engine.generation.sampling.step_outcome import StepOutcome
from engine.generation.step import Step
from engine.layers.step_inputs import StepTensors
from engine.llm import LLM
from engine.models.registry import read_config
from engine.request import SamplingParams
from tests.gpu.emulated import faults
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import PROMPTS, SCATTERED, Placed
from tests.helpers.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

# Blocks of two prefixes, and few of their own behind them.
SHARED = [[*range(first, first + 16), *range(own)] for own in (3, 7, 0, 1) for first in (20, 60)]

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Job:
    """One job of a small random model."""

    family: str
    ranks: int = 2
    settings: dict[str, Any] = field(default_factory=dict)  # sections of the config
    sampling: list[dict[str, Any]] = field(default_factory=lambda: [{}])  # in turn, per prompt
    placement: Placed | None = None
    prompts: list[list[int]] = field(default_factory=lambda: PROMPTS)


@dataclass(frozen=True)
class Seen:
    """What a rank saw of a job."""

    done: list[dict[str, Any]]  # the completions
    loads: dict[int, list[int]]  # rows of every expert, by layer
    preemptions: int
    replays: int  # steps that graphs ran
    buckets: tuple[int, ...]  # of these steps
    empty: int  # of these steps without a sequence here
    late: int  # of these steps, whose tokens the host read once the next was queued
    syncs: tuple[int, ...]  # of these steps, where they are
    kernels: tuple[int, ...]  # of these steps, outside of the graphs
    setting: Any  # runtime.graphs as resolved


def seen_by(
    rank: int, guard: Path, path: Path, job: Job, graphs: str, plant: Plant | None = None
) -> Seen:
    """Run a job with or without graphs. plant: plants a fault."""
    os.environ["LOCKSTEP_NATIVE"] = "0"
    tree: dict[str, Any] = {
        "model": {"path": str(path), "max_model_len": 64, "dtype": "bfloat16"},
        "scheduler": {
            "kv_cache_blocks": 64,
            "block_size": 4,
            "max_batch_tokens": 24,
            "max_sequences": 4,
        },
        "runtime": {"device": "cuda", "shared_memory": False, "timeout_s": 60.0, "graphs": graphs},
        "moe": {"experts": {"backend": "grouped_mm"}},
    }
    for section, values in job.settings.items():
        tree[section] = {**tree.get(section, {}), **values}
    if job.placement is not None:
        tree["moe"] = {**tree["moe"], "placement": str(job.placement.write(path, rank))}
    # Transformers' modules are imported before the emulation replaces types that they annotate.
    read_config(path, tree["model"].get("implementation", "auto"))
    buckets: list[int] = []
    late: list[bool] = []
    empty, syncs, kernels = [], [], []
    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard):
        replay = GraphSteps.run

        def noted(
            self: GraphSteps, step: Step, bucket: int, **options: Any
        ) -> StepOutcome | LateStep:
            before = sum(DEVICE.syncs.values()), sum(DEVICE.kernels.values())
            outcome = replay(self, step, bucket, **options)
            late.append(isinstance(outcome, LateStep))
            buckets.append(bucket)
            empty.append(not step.slices)
            syncs.append(sum(DEVICE.syncs.values()) - before[0])
            kernels.append(sum(DEVICE.kernels.values()) - before[1])
            return outcome

        patch.setattr(GraphSteps, "run", noted)
        if plant is not None:
            plant(patch)
        llm = LLM(config_from_tree(tree))
        options = [{"max_new_tokens": 8, "ignore_eos": True, **each} for each in job.sampling]
        each = [SamplingParams(**options[n % len(options)]) for n in range(len(job.prompts))]
        done = llm.generate(job.prompts, each)
        assert llm.report is not None
        loads = llm._telemetry.loads.layers
        seen = Seen(
            done=[{**item.record(), "timing": None} for item in done],
            loads={layer: load.experts.tolist() for layer, load in loads.items()},
            preemptions=llm.report.ranks[rank].preemptions,
            replays=len(buckets),
            buckets=tuple(sorted(set(buckets))),
            empty=sum(empty),
            late=sum(late),
            syncs=tuple(syncs),
            kernels=tuple(kernels),
            setting=llm.resolved_settings["runtime.graphs"],
        )
        llm.close()
    return seen


def seen_with_and_without(rank: int, guard: Path, path: Path, job: Job) -> tuple[Seen, Seen]:
    return tuple(seen_by(rank, guard, path, job, each) for each in ("auto", "off"))  # pyright: ignore


Run = Callable[[Job], list[tuple[Seen, Seen]]]


@pytest.fixture
def compared(guard: Path, checkpoint: Callable[[str], Path]) -> Run:
    """A function that runs a job both ways, and compares completions and loads."""

    def run(job: Job) -> list[tuple[Seen, Seen]]:
        both = run_ranks(
            seen_with_and_without, job.ranks, guard, checkpoint(job.family), job, timeout=200
        )
        for graphs, eager in both:
            assert graphs.done == eager.done
            assert graphs.preemptions == eager.preemptions
            assert eager.replays == 0 and eager.setting == "off: runtime.graphs is off"
            assert graphs.setting == [1, 2, 4]
            assert graphs.replays == both[0][0].replays > 0
            assert graphs.buckets == both[0][0].buckets
            assert graphs.loads == eager.loads
        return both

    return run


STATES = {"max_new_tokens": 12}
SAMPLED = [{"temperature": 0.9, "seed": 1}, {"temperature": 0.7, "top_p": 0.6}, {}]
JOBS = {
    "mixtral": Job("mixtral"),
    "mixtral alone": Job("mixtral", 1),
    "olmoe sampled": Job("olmoe", 1, sampling=SAMPLED),
    "qwen3 copies": Job("qwen3_moe", placement=Placed(SCATTERED, (0, 2, 5))),
    "qwen3 four ranks": Job("qwen3_moe", 4),
    "deepseek-v2 tensor": Job("deepseek_v2", settings={"parallel": {"tensor": 2}}),
    "deepseek-v3": Job("deepseek_v3"),
    "gpt-oss": Job("gpt_oss"),
    "qwen3-next": Job("qwen3_next", sampling=[STATES]),
    "partial sums": Job(
        "qwen3_moe",
        settings={
            "moe": {
                "experts": {"backend": "grouped_mm"},
                "dispatch": {"partial_sums": True, "exchange": "auto"},
            }
        },
    ),
    "tensor 2 of 4": Job("mixtral", 4, {"parallel": {"tensor": 2}}),
    "prefixes": Job("mixtral", prompts=SHARED),
    "preemption": Job(
        "mixtral",
        settings={
            "scheduler": {
                "kv_cache_blocks": 16,
                "block_size": 4,
                "max_batch_tokens": 24,
                "max_sequences": 4,
            }
        },
        sampling=[{"max_new_tokens": 20}],
    ),
    "stop tokens": Job("olmoe", sampling=[{"stop_token_ids": (7, 8, 71), "max_new_tokens": 12}]),
    "host rows": Job("mixtral", sampling=[{}, {}, {}, {"logprobs": True}, {"min_p": 0.1}]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", JOBS)
def test_completions_and_loads_are_those_without_graphs(compared: Run, name: str) -> None:
    both = compared(JOBS[name])
    assert any(graphs.preemptions for graphs, _ in both) == (name == "preemption")
    for graphs, _ in both:
        assert max(graphs.syncs) <= 1, "the tokens"
        assert max(graphs.kernels) <= 12


IN_TURN = {"scheduler": {"async_scheduling": "off", "kv_cache_blocks": 64, "block_size": 4}}
IN_TURN["scheduler"] |= {"max_batch_tokens": 24, "max_sequences": 4}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["stop tokens", "mixtral", "olmoe sampled", "qwen3-next", "host rows"]
)
def test_replays_one_behind_the_other_give_what_steps_in_turn_give(
    guard: Path, checkpoint: Callable[[str], Path], name: str
) -> None:
    job = JOBS[name]
    ahead, in_turn = (
        run_ranks(seen_by, job.ranks, guard, checkpoint(job.family), each, "auto", timeout=200)
        for each in (job, replace(job, settings=job.settings | IN_TURN))
    )
    assert [seen.done for seen in ahead] == [seen.done for seen in in_turn]
    assert all(seen.late > 0 for seen in ahead) and not any(seen.late for seen in in_turn)
    if name != "host rows":
        assert all(seen.replays - seen.late <= seen.empty for seen in ahead)
        assert not any(sum(seen.syncs) for seen in ahead), "the host waits behind the next replay"


def host_wait_in_a_layer(patch: pytest.MonkeyPatch) -> None:
    """Read one number of the router's scores on the host."""
    faults.item_in_a_layer(patch)


def tables_made_anew(patch: pytest.MonkeyPatch) -> None:
    """Replace the tables of a layer's exchange once graphs have been captured."""
    capture = LLM._capture

    def capture_and_reset(self: LLM) -> GraphSteps:
        graphs = capture(self)
        for layer in self.model.moe_layers:
            layer.static.reset()
        return graphs

    patch.setattr(LLM, "_capture", capture_and_reset)


def idle_rows_with_experts(patch: pytest.MonkeyPatch) -> None:
    """Let rows without a sequence take experts."""
    patch.setattr(StepTensors, "live_T", None)


@pytest.mark.long
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (
            host_wait_in_a_layer,
            r"(?s)runtime\.graphs = 'auto': steps of 4 rows could not be captured .*CaptureError: "
            r".*faults\.py:\d+: the host waits.*set runtime\.graphs=off",
        ),
        (tables_made_anew, "CaptureError: .*from before the capture, whose memory is gone"),
    ],
)
def test_what_a_graph_does_not_stand_is_caught(
    guard: Path, checkpoint: Callable[[str], Path], plant: Plant, words: str
) -> None:
    with pytest.raises(RanksFailed, match=words):
        run_ranks(seen_by, 1, guard, checkpoint("mixtral"), Job("mixtral", 1), "auto", plant)


@pytest.mark.long
def test_idle_rows_would_count_in_the_loads(guard: Path, checkpoint: Callable[[str], Path]) -> None:
    args = guard, checkpoint("mixtral"), Job("mixtral", 1, prompts=PROMPTS[:3]), "auto"
    (plain,) = run_ranks(seen_by, 1, *args)
    (planted,) = run_ranks(seen_by, 1, *args, idle_rows_with_experts)
    assert planted.done == plain.done and 4 in plain.buckets
    more = [sum(planted.loads[layer]) - sum(plain.loads[layer]) for layer in plain.loads]
    assert min(more) > 0


def test_the_first_steps_and_every_sixteenth_are_eager(
    guard: Path, checkpoint: Callable[[str], Path]
) -> None:
    job = Job("mixtral", 1, prompts=[[1, 2]], sampling=[{"max_new_tokens": 40}])
    (seen,) = run_ranks(seen_by, 1, guard, checkpoint("mixtral"), job, "auto")
    assert seen.replays == 40 - len((0, 1, 2, 16, 32))


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moe": {"dispatch": {"exchange": "counted"}}}, "moe.dispatch.exchange is counted"),
        ({"moe": {"experts": {"backend": "torch"}}}, "only grouped_mm in the model's precision"),
        ({"profiler": {"every": 1}}, "profiler.every is 1"),
        ({"model": {"implementation": "transformers"}}, "transformers builds the model"),
    ],
)
def test_why_there_are_no_graphs_is_said(
    guard: Path, checkpoint: Callable[[str], Path], settings: dict[str, Any], words: str
) -> None:
    job = Job("mixtral", 1, settings, prompts=PROMPTS[:2])
    (seen,) = run_ranks(seen_by, 1, guard, checkpoint("mixtral"), job, "auto")
    assert seen.replays == 0
    assert seen.setting.startswith("off: ") and words in seen.setting
