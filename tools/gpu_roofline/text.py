"""Text: the report of `tools/roofline.py` as tables."""

from __future__ import annotations

from typing import Any

from bench.report import table


def text_of(report: dict[str, Any]) -> str:
    """Return the report as text."""
    device = report["device"]
    lines = [
        f"{report['model']} on {report['ranks']} x {device['name']}: "
        f"{report['weights_gib']:.1f} GiB of weights and {report['kv_gib']:.1f} of keys and values "
        f"per rank, {'fits' if report['fits'] else 'DOES NOT FIT'}",
        report["what"],
    ]
    for step in report["steps"]:
        tokens = f"{step['tokens_per_rank']:,} tokens per rank"
        lines += ["", f"{step['phase']}, {tokens}; bound by {step['bound_by']}"]
        rows = [
            [part["name"], part["gb"], part["tflop"], part["ms"], part["bound_by"]]
            for part in step["parts"]
        ]
        counts = step["launches"]
        collectives = f"{counts['collectives']:.0f} collectives"
        rows.append(["between ranks", None, None, step["exchange_ms"], collectives])
        launched = f"{counts['kernels']:.0f} kernels, {counts['syncs']:.0f} waits"
        rows.append(["host, eager", None, None, step["host_ms"], launched])
        lines.append(table(["part", "GB", "TFLOP", "ms", "by"], rows, left=(0, 4)))
        rows = [
            [name, ms, step["ms"]["bound"] / ms, step["tokens_per_s"][name]]
            for name, ms in step["ms"].items()
        ]
        lines += ["", table(["step", "ms", "share of the bound", "tokens/s"], rows)]
        lines.append(f"launches per layer as counted for {step['launches_from']!r}")
    if report["compared"]:
        rows = [list(each.values()) for each in report["compared"]]
        heading = f"measured on {report['measured_on']}"
        lines += ["", heading, table(["figure", "modelled ms", "measured ms", "ratio"], rows)]
    return "\n".join(lines)
