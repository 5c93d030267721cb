"""How long a step must take on a GPU, and what bounds it: a model, not a measurement.

    python tools/roofline.py --model Mixtral-8x7B --device h100 --ranks 8 --batch 64
    python tools/roofline.py --model /data/Qwen3-235B --device h200 --ranks 8 --batch 128 --json

Bytes and operations come from the engine's own weights on torch's meta device, launches from the
table of emulated CUDA, rates from published figures of the device (`tools/gpu_roofline/`). Where
`tools/gpu_suite.py --only speed` has run on such a device, its rates are taken (`--measured`) and
its steps compared with the modelled ones. A table is printed, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # engine
from gpu_checks.shapes import MIXTRAL, QWEN3, ModelShape, config_fields
from gpu_roofline import measured
from gpu_roofline.device import DEVICES, Assumed, Device
from gpu_roofline.estimate import Estimate, estimate
from gpu_roofline.text import text_of
from gpu_roofline.work import Load, work_of

from engine.config import Config, ModelConfig
from engine.generation.quantization import resolve_quantization
from engine.layers.precision import compute_dtype
from engine.model_check.config_reading import read_checkpoint_config
from engine.model_check.rank_share import Setup
from engine.models.weight_dtype import model_dtype

_WHOLE = {  # models by name, without a checkpoint
    each.name: each for each in (replace(MIXTRAL, layers=32), replace(QWEN3, layers=48))
}
_SUITE = {"sequences": 64, "context": 271, "prompts": 4, "length": 2048}  # of gpu_checks/speed.py
_NOTE = (
    "A model: published rates, assumed shares of them, launches counted on an emulated device. "
    "Nothing here was measured on a GPU."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code."""
    options = _parser().parse_args(argv)
    try:
        report = make_report(options)
    except ValueError as error:
        print(f"roofline.py: {error}", file=sys.stderr)
        return 2
    if not options.json:
        print(text_of(report))
    print(json.dumps(report))
    return 0


def make_report(options: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is printed.

    Raises:
        ValueError: the model or a record cannot be read, or does not run on so many ranks.
    """
    device, assumed = DEVICES[options.device], Assumed()
    figures: dict[str, float] = {}
    hardware = None
    record = options.measured or (measured.FILE if measured.FILE.is_file() else None)
    if record is not None:
        hardware, figures = measured.read_figures(record)
        if measured.device_of(hardware, DEVICES) == options.device:
            device, assumed = measured.with_measured(device, assumed, figures)
        elif options.measured is not None:
            raise ValueError(
                f"--measured: the record is of {hardware}, not of --device {options.device}; "
                "name the device it was made on"
            )
        else:
            hardware, figures = None, {}
    with tempfile.TemporaryDirectory(prefix="roofline-") as name:
        setup, family = _setup(options.model, Path(name), options)
        model = setup.build(options.ranks)
    common = {
        "ranks": options.ranks,
        "tensor": options.tensor,
        "imbalance": options.imbalance,
        "partial_sums": options.partial_sums,
    }
    loads = {
        "decode": Load(sequences=options.batch, queries=1, context=options.context, **common),
        "prefill": Load(sequences=options.prompts, queries=options.length, context=0, **common),
    }
    steps = []
    held = 0
    for phase, load in loads.items():
        work = work_of(model, load, setup.names)
        held = work.weight_bytes
        steps.append(estimate(phase, work, load, device, assumed, family, options.ranks_per_host))
    spec = model.kv_spec
    kv_bytes = options.batch * (
        (options.context + 1) * spec.bytes_per_block(1, model.dtype) + spec.state_bytes
    )
    return {
        "what": _NOTE,
        "model": str(options.model),
        "device": asdict(device),
        "assumed": asdict(assumed),
        "measured_on": hardware,
        "ranks": options.ranks,
        "batch_per_rank": options.batch,
        "context": options.context,
        "imbalance": options.imbalance,
        "partial_sums": options.partial_sums,
        "weights_gib": held / 2**30,
        "kv_gib": kv_bytes / 2**30,
        "fits": held + kv_bytes < 0.9 * device.memory_gib * 2**30,
        "steps": [_as_json(step, assumed, loads[step.phase]) for step in steps],
        "compared": list(measured.compared(figures, _modelled(device, assumed))) if figures else [],
    }


def _setup(model: str, folder: Path, options: argparse.Namespace) -> tuple[Setup, str]:
    """Return how ranks hold a model, and its family."""
    path = Path(model)
    if (shape := _WHOLE.get(model)) is not None:
        path = folder
        (path / "config.json").write_text(json.dumps(config_fields(shape)), encoding="utf-8")
    reading = read_checkpoint_config(path)
    if reading.hf_config is None or reading.problems:
        raise ValueError(f"--model = {model!r}: {'; '.join(reading.problems)}")
    cuda = torch.device("cuda")
    dtype = model_dtype(options.dtype, reading.hf_config, cuda)
    setup = Setup(reading.hf_config, dtype, options.tensor)
    given = ModelConfig(
        path=str(path), quantization=options.quantization, load_format=_load_format(path)
    )
    held = resolve_quantization(
        Config(model=given), setup.build().spec, cuda, compute_dtype(dtype, cuda)
    )
    return replace(setup, layouts=held.layouts), reading.hf_config.model_type


def _load_format(path: Path) -> Any:
    return "safetensors" if any(path.glob("*.safetensors")) else "dummy"


def _modelled(device: Device, assumed: Assumed) -> dict[str, float]:
    """Return the suite's steps of four layers on one rank, in ms, by the names of its figures."""
    found: dict[str, float] = {}
    for shape in (MIXTRAL, QWEN3):
        found |= _suite_steps(shape, device, assumed)
    return found


def _suite_steps(shape: ModelShape, device: Device, assumed: Assumed) -> dict[str, float]:
    options = argparse.Namespace(dtype="bfloat16", quantization="auto", tensor=1)
    with tempfile.TemporaryDirectory(prefix="roofline-") as name:
        (Path(name) / "config.json").write_text(json.dumps(config_fields(shape)), encoding="utf-8")
        setup, family = _setup(name, Path(name), options)
        model = setup.build(1)
    decode = Load(ranks=1, sequences=_SUITE["sequences"], queries=1, context=_SUITE["context"])
    prefill = Load(ranks=1, sequences=_SUITE["prompts"], queries=_SUITE["length"], context=0)
    steps = {
        phase: estimate(phase, work_of(model, load), load, device, assumed, family, 8)
        for phase, load in (("decode", decode), ("prefill", prefill))
    }
    return {
        measured.DECODE.format(shape.name): 1e3 * steps["decode"].eager,
        measured.PREFILL.format(shape.name): 1e3 * steps["prefill"].eager / shape.layers,
    }


def _as_json(step: Estimate, assumed: Assumed, load: Load) -> dict[str, Any]:
    times = {
        "bound": step.bound,
        "device": step.device,
        "eager": step.eager,
    }
    if (graph := step.graph(assumed)) is not None:
        times["graph"] = graph
    return {
        "phase": step.phase,
        "tokens_per_rank": load.tokens,
        "bound_by": step.bound_by,
        "ms": {name: 1e3 * seconds for name, seconds in times.items()},
        "tokens_per_s": {
            name: load.tokens * load.ranks / load.tensor / seconds
            for name, seconds in times.items()
        },
        "exchange_ms": 1e3 * step.exchange,
        "host_ms": 1e3 * step.host,
        "launches": step.launches,
        "launches_from": step.launches_from,
        "parts": [
            {
                "name": part.name,
                "gb": part.memory / 1e9,
                "tflop": part.flops / 1e12,
                "ms": 1e3 * part.seconds,
                "bound_by": part.bound_by,
            }
            for part in step.parts
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True,
        help=f"a folder with config.json, or one of {', '.join(_WHOLE)}",
    )  # fmt: skip
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument(
        "--ranks", type=_whole, default=8, help="expert-parallel ranks, one GPU each"
    )
    parser.add_argument("--tensor", type=_whole, default=1, help="parallel.tensor")
    parser.add_argument("--ranks-per-host", type=_whole, default=8, help="GPUs of one host")
    parser.add_argument("--batch", type=_whole, default=64, help="sequences per rank in decode")
    parser.add_argument("--context", type=_whole, default=1024, help="tokens of each of them")
    parser.add_argument("--prompts", type=_whole, default=4, help="prompts per rank in prefill")
    parser.add_argument("--length", type=_whole, default=2048, help="tokens of each of them")
    parser.add_argument(
        "--imbalance", type=_factor, default=1.0,
        help="rows of the most loaded rank over the mean (default: 1, even)",
    )  # fmt: skip
    parser.add_argument(
        "--partial-sums",
        action="store_true",
        help="moe.dispatch.partial_sums: one row home per rank",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto"
    )
    parser.add_argument(
        "--quantization", default="auto",
        choices=("auto", "keep", "dequantize", "int8", "int4", "fp8"),
        help="model.quantization",
    )  # fmt: skip
    parser.add_argument(
        "--measured", type=Path,
        help="a record of gpu_suite.py --only speed (default: docs/results/gpu, where it is of "
        "this device)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
