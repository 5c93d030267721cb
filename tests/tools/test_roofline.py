"""tools/roofline.py: what a step reads and computes, the times that follow, and its refusals.

Run: pytest tests/tools/test_roofline.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import roofline
import torch
from gpu_checks.shapes import MIXTRAL, QWEN3, config_fields
from gpu_roofline.device import DEVICES, Assumed
from gpu_roofline.estimate import estimate
from gpu_roofline.work import Load, Work, work_of
from make_random_checkpoint import make_checkpoint

from engine.model_check.config_reading import read_checkpoint_config
from engine.model_check.rank_share import Setup

H100 = DEVICES["h100"]


def setup_of(folder: Path) -> Setup:
    reading = read_checkpoint_config(folder)
    assert reading.hf_config is not None
    return Setup(reading.hf_config, torch.bfloat16)


def work(folder: Path, load: Load) -> Work:
    return work_of(setup_of(folder).build(load.ranks), load)


def of_shape(tmp_path: Path, shape: Any, load: Load) -> Work:
    (tmp_path / "config.json").write_text(json.dumps(config_fields(shape)))
    return work(tmp_path, load)


@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3], ids=["mixtral", "qwen3"])
def test_bytes_and_operations_are_those_worked_out_by_hand(shape: Any, tmp_path: Path) -> None:
    decode = of_shape(tmp_path, shape, Load(ranks=1, sequences=64, queries=1, context=271))
    # Written keys, the norms and the rows around the experts are not in the other formula.
    found = sum(part.memory for name, part in decode.parts.items() if name != "rows")
    assert found == pytest.approx(shape.decode_bytes(64, 272), rel=2e-3)
    prefill = of_shape(tmp_path, shape, Load(ranks=1, sequences=4, queries=2048, context=0))
    found = sum(part.flops for name, part in prefill.parts.items() if name != "head")
    assert found == pytest.approx(shape.layers * shape.prefill_flops(4, 2048), rel=1e-3)


def test_ranks_share_experts_and_send_what_is_not_theirs(tmp_path: Path) -> None:
    whole, eighth = (
        of_shape(tmp_path, MIXTRAL, Load(ranks=ranks, sequences=512 // ranks, queries=1, context=9))
        for ranks in (1, 8)
    )
    assert eighth.parts["experts"].memory == pytest.approx(whole.parts["experts"].memory / 8)
    assert eighth.parts["experts"].flops == pytest.approx(whole.parts["experts"].flops / 8)
    assert whole.sent == 0
    # 64 tokens to two experts each, of 8 ranks 7 are others, out and home, in each of 4 layers.
    assert eighth.sent == pytest.approx(4 * 2 * 64 * 2 * 7 / 8 * MIXTRAL.hidden * 2)


def test_partial_sums_bring_one_row_home_per_token_and_rank(tmp_path: Path) -> None:
    load = Load(ranks=8, sequences=60, queries=1, context=9)
    plain, summed = (
        of_shape(tmp_path, QWEN3, each) for each in (load, replace(load, partial_sums=True))
    )
    row = 4 * 7 * 64 * QWEN3.hidden * 2  # layers, other ranks, rows of the bucket, bytes
    assert plain.static_sent == row * (1 + 8) and summed.static_sent == row * 2
    assert summed.sent < plain.sent
    large = of_shape(tmp_path, QWEN3, replace(load, sequences=257))
    assert large.static_sent is None


def test_a_hot_rank_computes_its_rows_and_reads_no_more_weights(tmp_path: Path) -> None:
    even = Load(ranks=8, sequences=4, queries=512, context=0)
    one, two = (of_shape(tmp_path, MIXTRAL, load) for load in (even, replace(even, imbalance=2.0)))
    assert two.parts["experts"].flops == 2 * one.parts["experts"].flops
    assert two.parts["experts"].memory == one.parts["experts"].memory


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "qwen3_next", "gpt_oss", "llama4_text", "longcat_flash"]
)
def test_every_kind_of_attention_has_bytes_and_operations(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, size="tiny")
    short, long = (
        work(tmp_path, Load(ranks=1, sequences=2, queries=1, context=context))
        for context in (100, 10_000)
    )
    name = "keys and values"
    assert 0 < short.parts[name].memory < long.parts[name].memory
    assert 0 < short.parts[name].flops < long.parts[name].flops


def test_a_window_bounds_the_keys_that_are_read(tmp_path: Path) -> None:
    shape = config_fields(replace(MIXTRAL, layers=2)) | {"sliding_window": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    near, far = (
        work(tmp_path, Load(ranks=1, sequences=1, queries=1, context=context))
        for context in (100, 10_000)
    )
    assert near.parts["keys and values"] == far.parts["keys and values"]


def test_the_slower_of_memory_products_links_and_host_bounds_a_step(tmp_path: Path) -> None:
    load = Load(ranks=8, sequences=64, queries=1, context=1024)
    found = of_shape(tmp_path, MIXTRAL, load)

    assumed = Assumed(host_s=0.0)  # which is that of a whole model, and there are four layers

    def bound(device: Any = H100, assumed: Assumed = assumed, host: int = 8) -> str:
        return estimate("decode", found, load, device, assumed, "mixtral", host).bound_by

    assert bound() == "memory"
    assert bound(assumed=Assumed(launch_s=1e-4)) == "launches"
    assert bound(device=replace(H100, flops=1e12)) == "products"
    assert bound(device=replace(H100, network_bytes=1e8), host=1) == "links"


def test_the_report_has_a_line_of_json_and_says_that_it_is_a_model(capsys: Any) -> None:
    assert roofline.main("--model Mixtral-8x7B --ranks 8 --batch 64".split()) == 0
    *text, line = capsys.readouterr().out.strip().splitlines()
    found = json.loads(line)
    assert "Nothing here was measured on a GPU" in "\n".join(text)
    assert [step["phase"] for step in found["steps"]] == ["decode", "prefill"]
    times = found["steps"][0]["ms"]
    assert times["bound"] < min(times["device"], times["graph"]) <= times["eager"]
    assert found["weights_gib"] == pytest.approx(13.5, abs=0.1) and found["compared"] == []


def test_a_record_of_the_suite_gives_its_rates_and_is_compared(tmp_path: Path, capsys: Any) -> None:
    figures = {
        "copy, GB/s": 2800.0,
        "matrix product, bfloat16, TFLOP/s": 600.0,
        "Mixtral-8x7B: decode step, ms": 9.0,
    }
    checks = [{"name": name, "value": value} for name, value in figures.items()]
    record = tmp_path / "suite.json"
    record.write_text(
        json.dumps({"hardware": "NVIDIA H100 80GB HBM3", "parts": {"speed": {"checks": checks}}})
    )
    arguments = ["--model", "Mixtral-8x7B", "--measured", str(record)]
    assert roofline.main([*arguments, "--device", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["memory_bytes"] == 2.8e12 and found["assumed"]["memory_share"] == 1.0
    (row,) = found["compared"]
    assert row["measured_ms"] == 9.0 and 3 < row["modelled_ms"] < 12
    assert roofline.main([*arguments, "--device", "b200"]) == 2
    assert "the record is of NVIDIA H100 80GB HBM3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model /no/such", "no such folder"),
        ("--model Mixtral-8x7B --ranks 12", "8 experts"),
        ("--model Mixtral-8x7B --measured /no/such", "--measured"),
    ],
)
def test_what_cannot_be_modelled_is_refused_in_words(
    arguments: str, said: str, capsys: Any
) -> None:
    assert roofline.main(arguments.split()) == 2
    assert said in capsys.readouterr().err
