"""Write docs/models.md: every model type with experts, whether it runs, and why not.

    python tools/models_docs.py            # write the page; half a minute
    python tools/models_docs.py --check    # exit code 1 if the page is not current

Model types are found in transformers (`model_table/configurations.py`); each is built as a run
builds it, without memory (`model_table/rows.py`), so that the page says what the engine does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import transformers  # noqa: E402
from generated_page import run  # noqa: E402
from model_table.configurations import configurations  # noqa: E402
from model_table.published_names import PUBLISHED  # noqa: E402
from model_table.rows import Row, rows_of  # noqa: E402

from engine.models.transformers_model.plug_in import VERSIONS  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
COMMAND = "python tools/models_docs.py"
INTRODUCTION = f"""\
<!-- Written by `{COMMAND}`, which builds each model without memory. -->

# Models

Every `model_type` of config.json with experts that transformers {VERSIONS} has a class for, and
those that are read here alone. `lockstep check-model DIR` says the same of one checkpoint, with its
files.

- *Runs*: the model of a configuration of this type is built, without weights. Where a parity test
  is named, tiny checkpoints with random weights were compared with transformers: the same logits
  and greedy tokens (`tests/models`). **No published weights were run**, and nothing ran on a GPU.
- The configuration is that of the parity test, else the default of transformers' class. A published
  checkpoint may have other settings, and is then refused by name before weights are read.
- *Built by*: what `model.implementation: auto` takes. [lockstep](checkpoints.md#families): a family
  of this engine; [transformers](checkpoints.md#other-families-built-by-transformers): its modules
  on this engine's cache, dispatch and experts. *Or transformers*: that setting builds it, too.
- *Scores*: by what [capacity](capacity.md) ranks assignments: the scores of all experts, or the
  combine weights of the chosen experts alone. Then its policies.
"""


def page() -> str:
    """Return the whole page.

    Raises:
        SystemExit: transformers is another version than the page speaks of.
    """
    if not is_known_version():
        raise SystemExit(
            f"docs/models.md is about transformers {VERSIONS}, and {transformers.__version__} is "
            "installed; install that version"
        )
    transformers.logging.set_verbosity_error()  # default configurations are not of one piece
    rows = rows_of(configurations())
    return "\n".join([INTRODUCTION, *_running(rows), "", *_refused(rows), ""])


def is_known_version() -> bool:
    """Return whether transformers is the version that the page is about."""
    return transformers.__version__.startswith(f"{VERSIONS}.")


def _running(rows: Sequence[Row]) -> Iterator[str]:
    yield "## What runs\n"
    yield "| `model_type` | models | built by | scores | policies | parity test |"
    yield "|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row.by_transformers, row.model_type)):
        if row.refusal is None:
            yield _line(
                f"`{row.model_type}`",
                PUBLISHED.get(row.model_type, ""),
                _built_by(row),
                row.scores,
                ", ".join(f"`{name}`" for name in row.policies),
                _tested(row),
            )


def _refused(rows: Sequence[Row]) -> Iterator[str]:
    yield "## What is refused\n"
    yield "Before weights are read, on every rank, with the reason:\n"
    yield "| `model_type` | models | why |"
    yield "|---|---|---|"
    for row in sorted(rows, key=lambda row: row.model_type):
        if row.refusal is not None:
            yield _line(f"`{row.model_type}`", PUBLISHED.get(row.model_type, ""), row.refusal)


def _built_by(row: Row) -> str:
    if row.by_transformers:
        return "transformers"
    return "lockstep, or transformers" if row.also else "lockstep"


def _tested(row: Row) -> str:
    if not row.cases:
        return "none; builds without memory"
    more = f" and {len(row.cases) - 1} more" if len(row.cases) > 1 else ""
    return f"`{row.cases[0]}`{more}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with --check compare it; return the exit code."""
    return run(argv, page, PAGE, ROOT, COMMAND)


if __name__ == "__main__":
    sys.exit(main())
