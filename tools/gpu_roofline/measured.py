"""Measured: figures of `tools/gpu_suite.py --only speed`, compared with what the model says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_roofline.device import Assumed, Device

FILE = Path(__file__).resolve().parents[2] / "docs" / "results" / "gpu" / "gpu_suite_cuda.json"
# Names of the suite's figures (`gpu_checks/speed.py`).
_COPY, _PRODUCT = "copy, GB/s", "matrix product, bfloat16, TFLOP/s"
DECODE, PREFILL = "{}: decode step, ms", "{}: prefill layer, ms"


def read_figures(path: Path) -> tuple[str, dict[str, float]]:
    """Return the hardware of a record and the figures of its part `speed`, by name.

    Raises:
        ValueError: the file is no record of the suite, or that part has not run.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checks = record["parts"]["speed"]["checks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--measured = {str(path)!r}: no record of `tools/gpu_suite.py --only speed` "
            f"({type(error).__name__}: {error}); run it on the GPU and name its JSON file"
        ) from error
    figures = {each["name"]: each["value"] for each in checks if each.get("value") is not None}
    return str(record.get("hardware", "unnamed")), figures


def with_measured(
    device: Device, assumed: Assumed, figures: dict[str, float]
) -> tuple[Device, Assumed]:
    """Return the device with the measured rates in place of published ones that are assumed."""
    if (copied := figures.get(_COPY)) is not None:
        device, assumed = (
            replace(device, memory_bytes=copied * 1e9),
            replace(assumed, memory_share=1.0),
        )
    if (product := figures.get(_PRODUCT)) is not None:
        device, assumed = replace(device, flops=product * 1e12), replace(assumed, product_share=1.0)
    return device, assumed


def device_of(hardware: str, devices: dict[str, Device]) -> str | None:
    """Return the name of the device that a record was made on, None where it is another."""
    for name in devices:
        if re.search(rf"\b{name}\b", hardware, re.IGNORECASE):
            return name
    return None


def compared(figures: dict[str, float], modelled: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yield a row for each figure, in ms, that was measured and modelled."""
    for name, value in modelled.items():
        if (measured := figures.get(name)) is not None:
            yield {
                "figure": name,
                "modelled_ms": value,
                "measured_ms": measured,
                "ratio": measured / value,
            }
