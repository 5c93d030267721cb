"""Write docs/configuration.md from engine/config/schema.py.

    python tools/config_docs.py            # write the page
    python tools/config_docs.py --check    # exit code 1 if the page is not current

A table per section: key, default, allowed values, and the comment behind the field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from generated_page import run  # noqa: E402

from engine.config import Config  # noqa: E402
from engine.config.validation import alternatives, describe, type_hints  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
COMMAND = "python tools/config_docs.py"
INTRODUCTION = f"""\
<!-- Written by `{COMMAND}` from engine/config/schema.py: change the comments there. -->

# Configuration

A config is a YAML file of the sections below; `configs/` has some. Only `model.path` is required.
`--set section.key=value` changes one setting on the command line and may be repeated; the value is
YAML, so `--set moe.capacity.phases=[prefill,decode]` is a list. From Python:
`load_config("tiny_mixtral", ["moe.capacity.policy=token_drop"])`. `--print-config` shows every
setting of a run.

An unknown key, a value that is not allowed and settings that contradict each other are errors,
reported together before a model is loaded. A relative `--config` is looked up from the working
directory and then in `configs/`; a relative path in `model` from the working directory and then
from the project's root.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *_sections(Config, "")])


def _sections(section: type, prefix: str) -> Iterator[str]:
    """Yield each section's heading and table, a section before those inside it."""
    comments, hints = field_comments(section), type_hints(section)
    rows, inside = [], []
    for item in dataclasses.fields(section):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            inside.append((hint, f"{prefix}{item.name}."))
            continue
        cells = (f"`{item.name}`", _default(item), _allowed(item, hint), comments[item.name])
        rows.append(f"| {' | '.join(cells)} |")
    if rows:
        yield f"## `{prefix[:-1]}`\n"
        yield f"{(inspect.getdoc(section) or '').splitlines()[0]}\n"
        yield "\n".join(["| key | default | allowed | what it does |", "|---|---|---|---|", *rows])
        yield ""
    for child, child_prefix in inside:
        yield from _sections(child, child_prefix)


def field_comments(section: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass; "" where there is none."""
    source = inspect.getsource(section)
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    ends = [node.lineno for node in body.body[1:]] + [len(source.splitlines()) + 1]
    return {
        node.target.id: " ".join(
            comments[line] for line in range(node.lineno, end) if line in comments
        )
        for node, end in zip(body.body, ends, strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    if item.default is None:
        return "`null`"
    if isinstance(item.default, bool):
        return f"`{str(item.default).lower()}`"
    if isinstance(item.default, tuple):
        return f"`[{', '.join(map(str, item.default))}]`"
    return f"`{item.default}`"


def _allowed(item: dataclasses.Field[Any], hint: Any) -> str:
    """Return what a value must be, in the words of the error that refuses others."""
    kinds = [option for option in alternatives(hint) if option is not NoneType]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if "rule" in item.metadata:
        rule = item.metadata["rule"].text
        whole = rule.startswith(("a ", "an ", "non-empty"))  # says the type too
        text = rule if whole else f"{describe(kinds[0])}, {rule}"
        for choice in choices:
            text = re.sub(rf"\b{choice}\b", f"`{choice}`", text)
    elif choices:
        text = ", ".join(f"`{choice}`" for choice in choices)
        if others := [describe(kind) for kind in kinds if get_origin(kind) is not Literal]:
            text = f"{' or '.join(others)}, or {text}"
    else:
        text = " or ".join(map(describe, kinds))
    return text + (", or `null`" if len(kinds) < len(alternatives(hint)) else "")


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with --check compare it; return the exit code."""
    return run(argv, page, PAGE, ROOT, COMMAND)


if __name__ == "__main__":
    sys.exit(main())
