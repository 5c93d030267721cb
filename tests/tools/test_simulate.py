"""lockstep simulate against real ranks: rows are those that ran, token by token and by counts.

Run: pytest tests/tools/test_simulate.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import load_config
from engine.llm import LLM
from engine.moe.placement.placement import LayerPlacement, Placement, Precision
from engine.moe.placement.placement_file import write_placement
from engine.reporting import open_exporters
from engine.request import SamplingParams
from engine.simulate import add_arguments, command
from engine.simulate.loads import read_traffic
from engine.simulate.placements import Placements
from engine.simulate.predict import Simulator
from engine.simulate.prediction import Prediction
from engine.simulate.scenario import scenarios
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    [random.Random(seed).randrange(4, 2000) for _ in range(length)]
    for seed, length in enumerate([15, 37, 9, 60, 8, 12, 33, 21])
]
EXPERTS = 8


def generate(rank: int, settings: list[str]) -> dict[int, tuple[float, float]]:
    """Run a job; return the most loaded rank's rows over the mean's before and after, by layer."""
    open_exporters.CLAIMS_EVERY = 1
    llm = LLM(load_config("tiny_mixtral_ep2", settings))
    llm.generate(PROMPTS, SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert llm.report is not None
    report = {
        each.layer: (each.rank_max_over_mean, each.rank_max_over_mean_after)
        for each in llm.report.layers
    }
    llm.close()
    return report


def job(folder: Path, ranks: int, *settings: str) -> dict[int, tuple[float, float]]:
    always = (
        "model.max_model_len=96", "scheduler.kv_cache_blocks=64", "runtime.device=cpu",
        f"parallel.expert={ranks}",
        f"profiler.spans={folder}/spans", f"profiler.routing={folder}/routing",
        "profiler.routing_claims=true",
    )  # fmt: skip
    return run_ranks(generate, ranks, [*always, *settings], timeout=120)[0]


def rows_that_ran(folder: Path, ranks: int) -> dict[int, list[list[int]]]:
    """Rows of every rank, step by step, by layer."""
    found: dict[int, list[list[int]]] = {}
    files = [folder / "spans" / f"spans.rank{rank:05d}.jsonl" for rank in range(ranks)]
    lines = [file.read_text().splitlines()[1:] for file in files]
    for step in zip(*lines, strict=True):
        parts = [json.loads(line)["after"] for line in step]
        for layer in parts[0]:
            found.setdefault(int(layer), []).append([sum(part[layer]) for part in parts])
    return found


def predict(
    folder: Path, ranks: int, placement: Path | None = None, **settings: Any
) -> tuple[Prediction, Any]:
    traffic = read_traffic(folder / "routing", None)
    chosen: dict[str, Any] = {
        "expert": None, "gammas": ["none"], "scope": "expert", "consensus": "global",
        "copies": [0 if placement is None else -1], "precision": "model", "tokens": [None],
        "ranks_per_node": [8], "slower": {},
    }  # fmt: skip
    (scenario,) = scenarios(num_experts=EXPERTS, top_k=2, ranks=[ranks], **(chosen | settings))
    simulator = Simulator(traffic, Placements(traffic, placement, 0), shape=None, costs=None)
    return simulator.predict(scenario), traffic


def placement(path: Path, ranks: int, precision: Precision) -> Path:
    homes = tuple(expert * ranks // EXPERTS for expert in range(EXPERTS))
    copies = {0: {1: (ranks - 1,), 7: (0,)}, 2: {4: (0,), 0: (1,), 5: (0,)}}
    layers = {
        layer: LayerPlacement(homes, tuple(held.get(e, ()) for e in range(EXPERTS)))
        for layer, held in copies.items()
    }
    write_placement(Placement(ranks, EXPERTS, layers, precision), path)
    return path


CASES = {
    "dropless": ((), {}),
    "expert scope": (("factor=1.1",), {"gammas": ["1.1"]}),
    "rank scope": (("factor=1.0", "scope=rank"), {"gammas": ["1.0"], "scope": "rank"}),
    "quota": (("factor=1.0", "consensus=quota"), {"gammas": ["1.0"], "consensus": "quota"}),
    "local": (("factor=1.0", "consensus=local"), {"gammas": ["1.0"], "consensus": "local"}),
    "copies": ((), {"copies": "model"}),
    "int4 copies": ((), {"copies": "int4"}),
    "copies, rank scope": (
        ("factor=1.0", "scope=rank"), {"gammas": ["1.0"], "scope": "rank", "copies": "model"},
    ),
    "copies, expert scope": (("factor=1.0",), {"gammas": ["1.0"], "copies": "model"}),
}  # fmt: skip
RUNS = [
    *((name, 2) for name in CASES),
    *((name, 4) for name in ("dropless", "rank scope", "copies, rank scope", "expert scope")),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "ranks"), RUNS)
def test_every_ranks_rows_are_those_of_the_real_job(name, ranks, tmp_path):
    capacity, settings = CASES[name]
    given = [f"moe.capacity.{each}" for each in capacity]
    if capacity:
        given.append("moe.capacity.policy=token_drop")
    settings, file = dict(settings), None
    if precision := settings.pop("copies", None):
        file = placement(tmp_path / "placement.yaml", ranks, precision)
        given.append(f"moe.placement={file}")
    report = job(tmp_path, ranks, *given)
    ran = rows_that_ran(tmp_path, ranks)
    predicted, _ = predict(tmp_path, ranks, file, **settings)
    assert predicted.is_exact
    for layer in predicted.layers:
        assert layer.rows_SW.tolist() == ran[layer.layer]
        # The report weighs steps alike: the most loaded rank's rows over the mean's, both summed.
        most, mean = layer.rows_SW.max(1).sum(), layer.rows_SW.mean(1).sum()
        assert most / mean == pytest.approx(report[layer.layer][1])
    if capacity and name != "copies, rank scope":
        assert predicted.drop_rate > 0


def run(*arguments: str, program: tuple[str, ...] = ("-m", "lockstep", "simulate")) -> tuple:
    result = subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'launch'}{os.pathsep}{ROOT}"},
    )
    assert "Traceback" not in result.stdout + result.stderr
    return result.returncode, result.stdout, result.stderr


SYNTHETIC = ("--synthetic", "zipf:0.8", "--experts", "32", "--top-k", "4", "--layers", "2")
SHAPE = ("--hidden", "1024", "--ffn", "512")


def scenarios_of(*arguments: str) -> list[dict[str, Any]]:
    """Run the command in this process; return what --json prints."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert command.run(parser.parse_args([*SYNTHETIC, *arguments, "--json"])) == 0
    return json.loads(printed.getvalue())["scenarios"]


@pytest.mark.long
def test_the_command_and_the_tool_print_one_table_and_draw_one_plot(tmp_path):
    plot = tmp_path / "plot.svg"
    given = (*SYNTHETIC, "--tokens", "4096", "--ranks", "8,64", "--device", "h100", *SHAPE)
    code, text, _ = run(*given, "--plot", str(plot))
    assert code == 0 and "8 ranks" in text and "64 ranks in 2 replicas" in text
    assert "ASSUMED" in text and text.count("loss") == 1
    assert "ASSUMED" in plot.read_text() and plot.read_text().count("<rect") > 8
    tool = (str(ROOT / "tools" / "simulate.py"),)
    assert run(*given, program=tool)[1] == text.replace(f"plot: {plot}\n", "")


def test_a_smaller_gamma_drops_more_and_never_takes_longer():
    found = scenarios_of(
        "--tokens", "8192", "--ranks", "8", "--gamma", "none,3,2,1.5,1", "--device", "h100", *SHAPE
    )
    rows = [each["most_rows"] for each in found]
    assert rows == sorted(rows, reverse=True) and rows[0] > rows[-1]
    drops = [each["drop_rate"] for each in found]
    assert drops == sorted(drops) and drops[0] == 0 < drops[-1]
    experts = [each["layers"][0]["ms"]["experts"] for each in found]
    assert experts == sorted(experts, reverse=True)


def test_more_copies_never_load_the_most_loaded_rank_more():
    found = scenarios_of("--tokens", "8192", "--ranks", "8", "--copies", "0,8,16")
    rows = [each["most_rows"] for each in found]
    assert rows == sorted(rows, reverse=True) and rows[0] > rows[-1]
    assert found[-1]["share"] > 0.95
    assert [each["layer_ms"] for each in found] == [None] * 3


def test_a_slower_rank_more_tokens_and_fewer_ranks_per_node_take_longer():
    def layer(*more: str) -> float:
        (found,) = scenarios_of("--ranks", "16", "--device", "h100", *SHAPE, *more)
        return found["layer_ms"]

    usual = layer("--tokens", "262144")
    assert layer("--tokens", "262144", "--slower", "3:4") > usual
    assert layer("--tokens", "524288") > usual
    assert layer("--tokens", "262144", "--ranks-per-node", "16") < usual
    h200 = layer("--tokens", "262144", "--device", "h200")
    assert h200 < usual  # more of what is bound by memory


def test_the_memory_of_a_rank_falls_with_ranks_and_grows_with_copies():
    few, many = scenarios_of("--tokens", "64", "--ranks", "4,16", *SHAPE)
    assert few["memory_gib"] > many["memory_gib"]
    none, copies = scenarios_of("--tokens", "64", "--ranks", "8", "--copies", "0,32", *SHAPE)
    assert copies["memory_gib"] > none["memory_gib"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "TRACE: give the folder"),
        (("/nowhere",), "/nowhere: no routing trace is there"),
        (("--synthetic", "flat"), "--experts: --synthetic needs it"),
        ((*SYNTHETIC, "--tokens", "64", "--ranks", "5000"), "--ranks 5000: must be 1 to 4,096"),
        ((*SYNTHETIC, "--tokens", "4", "--ranks", "8"), "--tokens 4: is less than one token"),
        ((*SYNTHETIC, "--tokens", "64", "--gamma", "-1"), "--gamma -1: moe.capacity.factor"),
        ((*SYNTHETIC, "--tokens", "64", "--expert", "3"), "--expert 3: must divide --ranks 8"),
        ((*SYNTHETIC, "--tokens", "64", "--device", "h100"), "--model: times need the sizes"),
        ((*SYNTHETIC, "--tokens", "64", "--device", "a100", *SHAPE), "give one of h100, h200"),
        ((*SYNTHETIC, "--tokens", "64", "--copies", "999"), "room for at most 224 copies"),
        ((*SYNTHETIC, "--tokens", "64", "--slower", "9:2"), "--slower 9:...: there are 8 ranks"),
        ((*SYNTHETIC, "--tokens", "64", "--fit", "/nowhere", *SHAPE), "no spans.rank*.jsonl"),
        ((*SYNTHETIC, "--tokens", "64", "--plot", "x.png"), "must end in .svg"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_words(given, words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError) as refused:
        command.run(parser.parse_args(list(given)))
    assert words in str(refused.value).replace("rank\\*", "rank*")


def test_a_wrong_option_ends_with_2_and_one_message():
    code, text, error = run("--ranks", "eight")
    assert code == 2 and text == "" and "must be a whole number from 1" in error
