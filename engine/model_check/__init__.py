"""Model check: whether this engine runs a checkpoint, on how many ranks, and what is missing.

    lockstep check-model DIR --ranks 8

Reads config.json and the headers of the safetensors files, never the weights, and needs neither a
GPU nor other ranks: `config_reading.py` collects what is wrong in config.json, `stored_tensors.py`
compares the files with the model, `parameters.py` counts, `rank_share.py` says what a rank holds,
`capacity_rules.py` what capacity can do, `report.py` prints it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_QUANTIZATIONS = ("auto", "keep", "dequantize", "int8", "int4", "fp8")
_IMPLEMENTATIONS = ("auto", "lockstep", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", metavar="DIR", help="the checkpoint: config.json, *.safetensors")
    parser.add_argument(
        "--ranks", type=_whole_numbers, default=(1, 2, 4, 8, 16), metavar="N",
        help="expert-parallel ranks, one GPU each; several as in 8,12 (default: 1,2,4,8,16)",
    )  # fmt: skip
    parser.add_argument(
        "--tensor", type=_at_least_1, default=1, metavar="N",
        help="ranks that share a layer's attention heads, parallel.tensor (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="auto",
        help="model.dtype, of weights and KV cache; auto: the checkpoint's, as on CUDA",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", choices=_QUANTIZATIONS, default="auto",
        help="model.quantization, how the experts are held; auto: as on CUDA",
    )  # fmt: skip
    parser.add_argument(
        "--implementation", choices=_IMPLEMENTATIONS, default="auto",
        help="model.implementation, who builds the model; auto: this engine where it has the "
        "family, else transformers",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-gib", type=_gib, action="append", metavar="X", dest="gpu_gib",
        help="memory of a GPU in GiB; may be repeated (default: 79 and 139, which GPUs of 80 and "
        "141 GB have)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _checked(read: Callable[[str], float], is_sound: Callable[[float], bool], what: str):
    def convert(text: str) -> float:
        try:
            value = read(text)
        except ValueError:
            value = float("nan")
        if not is_sound(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
        return value

    return convert


_MOST = 1_000_000
_at_least_1 = _checked(int, lambda value: 1 <= value <= _MOST, "a whole number from 1")
_gib = _checked(float, lambda value: 0 < value <= _MOST, "a number of GiB above 0")


def _whole_numbers(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(_at_least_1(part) for part in text.split(",")))
