"""Write docs/compatibility.md from the names of the tests.

    python tools/compatibility_docs.py            # write the page
    python tools/compatibility_docs.py --check    # exit code 1 if the page is not current

A test's name is its claim, so the page says what was tried and cannot say more than is tested.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from generated_page import run

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
COMMAND = "python tools/compatibility_docs.py"
INTRODUCTION = f"""\
<!-- Written by `{COMMAND}` from the names of the tests. -->

# Compatibility

What was tried: inputs, checkpoints, launch environments, file systems and terminals. Each row is
the claim of one test, with the file that checks it; a test may have many cases. What is not here
was not tried. Random inputs are tried beside these: `python -m tests.fuzz --minutes 30`.

Nothing here ran on a GPU, except where [Benchmarks](benchmarks.md) names one.
"""
GROUPS: dict[str, list[str]] = {
    "Inputs": [
        "tests/unit/batch/input/test_format.py",
        "tests/unit/batch/input/test_index.py",
        "tests/unit/batch/test_work_queue.py",
        "tests/unit/batch/test_line_parser.py",
        "tests/unit/batch/test_line_settings.py",
        "tests/unit/batch/test_strict_json.py",
    ],
    "Resuming and replacing": [
        "tests/distributed/test_batch_job.py",
        "tests/distributed/test_slices.py",
        "tests/unit/weights/test_fingerprint.py",
        "tests/unit/batch/test_manifest.py",
    ],
    "Checkpoints": [
        "tests/models/test_parity.py",
        "tests/models/test_registry.py",
        "tests/models/test_contradictions.py",
        "tests/unit/models/test_specs.py",
        "tests/unit/weights/test_loader.py",
        "tests/unit/weights/formats/test_scheme.py",
        "tests/unit/weights/formats/test_dequantised.py",
        "tests/distributed/test_quantised_checkpoints.py",
        "tests/unit/generation/test_tokenizer.py",
    ],
    "Launch environments": [
        "tests/cluster/test_slurm.py",
        "tests/cluster/test_mpi.py",
        "tests/cluster/test_deepspeed.py",
        "tests/cluster/test_elastic.py",
        "tests/distributed/test_bootstrap.py",
        "tests/unit/distributed/test_bootstrap.py",
        "tests/unit/distributed/test_rendezvous.py",
        "tests/unit/config/test_preflight.py",
    ],
    "Faults of ranks and hosts": ["tests/distributed/test_faults.py"],
    "Memory limits": ["tests/unit/generation/test_host_memory.py"],
    "File systems": ["tests/unit/batch/test_odd_file_systems.py"],
    "Terminals and pipes": ["tests/distributed/test_console.py"],
}


def page() -> str:
    """Return the whole page."""
    lines = [INTRODUCTION]
    for group, files in GROUPS.items():
        lines += [f"## {group}\n", "| what was tried | test |", "|---|---|"]
        lines += [f"| {claim} | `{file}` |" for file in files for claim in claims(ROOT / file)]
        lines.append("")
    return "\n".join(lines)


def claims(file: Path) -> Iterator[str]:
    """Yield the claims of a file of tests, in its order."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name.removeprefix("test_").replace("_", " ")


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with --check compare it; return the exit code."""
    return run(argv, page, PAGE, ROOT, COMMAND)


if __name__ == "__main__":
    sys.exit(main())
