"""How near `lockstep simulate` is to real ranks: fits costs on some jobs, predicts others.

    python tools/bench_simulate.py                       # 2 and 4 ranks of this machine
    python tools/bench_simulate.py --ranks 2 --tiny      # whether the bench itself works

Jobs of prefill steps run on real gloo ranks and record spans and routing. Costs are fitted to the
dropless jobs of --fit-tokens on the fewest ranks; then every other job (--tokens, times policies
and copies, times --ranks) is predicted from its recorded routing and compared with its spans:

    layer ms     measured, median over steps of the mean layer; predicted for the same steps
    error        predicted over measured
    rows         whether the most loaded rank's rows are equal in every layer and step

A table is printed, then one JSON line. The error means something on a quiet machine only, where
ranks have a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # engine
import numpy as np
from bench.candidate import REPOSITORY, TOOLS, WorkerError
from bench.environment_record import environment_record
from bench.report import emit, table

from engine.moe.placement.placement import Placement
from engine.moe.placement.placement_file import write_placement
from engine.moe.placement.search import plan_layer
from engine.simulate.cost_model import CostModel
from engine.simulate.fit import fit_costs
from engine.simulate.loads import Traffic, read_traffic
from engine.simulate.placements import Placements
from engine.simulate.predict import Simulator
from engine.simulate.scenario import scenarios
from engine.simulate.shape import read_shape
from engine.simulate.spans import LayerCall, read_calls

CONFIG = "tiny_mixtral_ep2"
CHECKPOINT = REPOSITORY / "configs" / "checkpoints" / "tiny_mixtral"
POLICIES = {
    "dropless": ("none", "expert"),
    "expert 1.2": ("1.2", "expert"),
    "rank 1.0": ("1.0", "rank"),
}
HEADER = ["ranks", "setting", "tokens", "measured ms", "predicted ms", "error", "rows"]
_PROMPT = 64  # tokens; steps are of whole prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; print the table and the JSON line."""
    options = _parse(argv)
    fewest = min(options.ranks)
    with tempfile.TemporaryDirectory(prefix="bench-simulate-") as name:
        folder = Path(name)
        fitted = []
        for tokens in options.fit_tokens:
            job = folder / f"fit{tokens}"
            _run(job, fewest, tokens, options, ())
            fitted += read_calls(job / "spans")
        source = f"dropless jobs of {options.fit_tokens} tokens per rank and step, {fewest} ranks"
        costs = fit_costs(fitted, "this machine", source, options.cores)
        cases = [
            _case(folder / f"{ranks}-{index}", ranks, tokens, setting, options, costs, folder)
            for ranks in options.ranks
            for index, (tokens, setting) in enumerate(
                (tokens, setting)
                for tokens in options.tokens
                for setting in (*POLICIES, f"{options.copies} copies")
            )
        ]
    rows = [
        [
            each["ranks"],
            each["setting"],
            each["tokens"],
            each["measured"] * 1e3,
            each["predicted"] * 1e3,
            f"{each['error']:+.1%}",
            "equal" if each["rows_equal"] else "DIFFER",
        ]
        for each in cases
    ]
    errors = [abs(each["error"]) for each in cases]
    text = (
        f"fitted on {source}; {len(cases)} jobs predicted, none of them fitted on\n"
        f"{table(HEADER, rows, left=(1, 6))}\n"
        f"error: median {statistics.median(errors):.1%}, most {max(errors):.1%}"
    )
    record = {
        "bench": "simulate",
        **environment_record(("torch",)),
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "fitted_on": source,
        "cases": cases,
        "median_error": statistics.median(errors),
        "most_error": max(errors),
    }
    emit(text, record, options.out, "bench_simulate")
    return 0


def _case(
    job: Path,
    ranks: int,
    tokens: int,
    setting: str,
    options: argparse.Namespace,
    costs: CostModel,
    folder: Path,
) -> dict[str, Any]:
    """Run one job and predict it."""
    gamma, scope = POLICIES.get(setting, ("none", "expert"))
    given: tuple[str, ...] = ()
    placement = None
    if gamma != "none":
        given = (
            "moe.capacity.policy=token_drop",
            f"moe.capacity.factor={gamma}",
            f"moe.capacity.scope={scope}",
        )
    if setting not in POLICIES:
        placement = folder / f"placement{ranks}.yaml"
        if not placement.is_file():
            first = min(options.fit_tokens)
            _plan(read_traffic(folder / f"fit{first}" / "routing", None), ranks, options, placement)
        given = (f"moe.placement={placement}",)
    _run(job, ranks, tokens, options, given)
    traffic, calls = read_traffic(job / "routing", None), read_calls(job / "spans")
    (scenario,) = scenarios(
        num_experts=traffic.num_experts,
        top_k=traffic.top_k,
        ranks=[ranks],
        expert=ranks,
        gammas=[gamma],
        scope=scope,  # type: ignore[arg-type]
        consensus="global",
        copies=[0 if placement is None else -1],
        precision="model",
        tokens=[None],
        ranks_per_node=[ranks],
        slower={},
    )
    simulator = Simulator(
        traffic,
        Placements(traffic, placement, 0),
        shape=read_shape(CHECKPOINT, "cpu"),
        costs=costs,
    )
    found = simulator.predict(scenario)
    assert traffic.keys_S3 is not None
    place = {int(step): index for index, step in enumerate(traffic.keys_S3[:, 1])}
    by_layer = {each.layer: each for each in found.layers}
    equal = all(
        by_layer[call.layer].rows_SW[place[call.step]].max() == call.most_rows for call in calls
    )
    measured = _median([call.seconds for call in calls], calls)
    predicted = _median([by_layer[c.layer].seconds_S[place[c.step]] for c in calls], calls)
    return {
        "ranks": ranks,
        "setting": setting,
        "tokens": tokens,
        "measured": measured,
        "predicted": predicted,
        "error": predicted / measured - 1,
        "rows_equal": bool(equal),
        "calls": len(calls),
    }


def _median(seconds: Sequence[float], calls: Sequence[LayerCall]) -> float:
    """Return the median over steps of the mean layer."""
    steps: dict[int, list[float]] = {}
    for call, each in zip(calls, seconds, strict=True):
        steps.setdefault(call.step, []).append(float(each))
    return float(np.median([statistics.mean(each) for each in steps.values()]))


def _plan(traffic: Traffic, ranks: int, options: argparse.Namespace, path: Path) -> None:
    layers = {
        layer: plan_layer(
            {"": traffic.loads_SLE[:, place]}, ranks, num_copies=options.copies, seed=place
        )
        for place, layer in enumerate(traffic.layers)
    }
    write_placement(Placement(ranks, traffic.num_experts, layers), path)


def _run(
    folder: Path, ranks: int, tokens: int, options: argparse.Namespace, settings: Sequence[str]
) -> None:
    """Run one job on real ranks; its spans and routing are in the folder.

    Raises:
        WorkerError: a rank failed or did not end in time.
    """
    prompts = max(1, tokens // _PROMPT) * ranks * options.steps
    blocks = 4 * max(tokens, _PROMPT) // 16 + 64
    job = {
        "config": CONFIG,
        "seed": tokens,
        "lengths": [min(_PROMPT, tokens)] * prompts,
        "settings": [
            f"model.max_model_len={2 * _PROMPT}",
            "model.dtype=float32",
            "runtime.device=cpu",
            f"parallel.expert={ranks}",
            f"scheduler.max_batch_tokens={tokens}",
            f"scheduler.kv_cache_blocks={blocks}",
            "scheduler.prefix_cache=false",
            f"profiler.spans={folder}/spans",
            f"profiler.routing={folder}/routing",
            "profiler.routing_claims=true",
            *settings,
        ],
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(ranks):
        environ = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TOOLS), str(REPOSITORY)]),
        }
        command = [sys.executable, "-m", "bench.workers.simulate_job", json.dumps(job)]
        running.append(
            subprocess.Popen(
                command, env=environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        )
    try:
        for rank, process in enumerate(running):
            _, error = process.communicate(timeout=options.timeout)
            if process.returncode:
                raise WorkerError(f"rank {rank} failed:\n{error.decode(errors='replace')[-2000:]}")
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"no result in {options.timeout} s") from error
    finally:
        for process in running:
            process.kill()
            process.wait()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--ranks", type=_numbers, default=[2, 4], metavar="N,...")
    add("--fit-tokens", type=_numbers, default=[64, 256, 1024, 4096], metavar="N,...",
        help="per rank and step, of the jobs that costs are fitted to")  # fmt: skip
    add("--tokens", type=_numbers, default=[512, 2048], metavar="N,...",
        help="per rank and step, of the jobs that are predicted")  # fmt: skip
    add("--copies", type=int, default=4, help="per layer, of one setting")
    add("--steps", type=int, default=24, help="of each job")
    add("--cores", type=int, default=len(os.sched_getaffinity(0)), help="that the ranks share")
    add("--timeout", type=float, default=600.0)
    add("--tiny", action="store_true", help="small jobs: whether the bench works")
    add("--out", type=Path, help="folder for bench_simulate.txt and .json")
    options = parser.parse_args(argv)
    if options.tiny:
        options.fit_tokens, options.tokens, options.steps = [64, 256], [128], 6
    return options


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",") if part.isdecimal() and int(part)]
    if len(values) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers from 1")
    return values


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        sys.exit(f"error: {error}")
