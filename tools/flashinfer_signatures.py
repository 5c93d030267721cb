"""Write the signatures of FlashInfer's paged wrappers, read from its wheel, which is not installed.

    pip download flashinfer-python --no-deps -d DIR
    python tools/flashinfer_signatures.py DIR/flashinfer_python-*.whl --date 2026-11-29

Writes tests/helpers/flashinfer_signatures.json: version, date, and per method its parameters in
order. The calls of engine/layers/attention_backends/flashinfer.py are bound to them in tests.
"""

from __future__ import annotations

import argparse
import ast
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "tests/helpers/flashinfer_signatures.json"
CLASSES = (
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
)
# Where `plan` passes its keywords on, the method that takes them.
METHODS = {"__init__": "__init__", "plan": "plan", "_plan_impl": "plan", "run": "run"}


def main(argv: list[str] | None = None) -> int:
    """Read the wheel and write the file; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--date", required=True, help="of the download, as 2026-11-29")
    args = parser.parse_args(argv)
    found: dict[str, list[dict[str, object]]] = {}
    with zipfile.ZipFile(args.wheel) as wheel:
        for name in wheel.namelist():
            if name.endswith(".py"):
                text = wheel.read(name).decode()
                if any(f"class {each}" in text for each in CLASSES):
                    found.update(signatures(ast.parse(text)))
    missing = [each for each in CLASSES if f"{each}.run" not in found]
    if missing:
        raise SystemExit(f"{args.wheel}: no {', '.join(missing)} in it")
    version = args.wheel.name.split("-")[1]
    record = {"version": version, "date": args.date, "signatures": dict(sorted(found.items()))}
    TARGET.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def signatures(module: ast.Module) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Yield Class.method and its parameters of the classes; of overloads the last, which runs."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name in CLASSES:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in METHODS:
                    yield f"{node.name}.{METHODS[method.name]}", list(parameters(method.args))


def parameters(args: ast.arguments) -> Iterator[dict[str, object]]:
    """Yield name, kind and whether there is a default, without `self`."""
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    for index, each in enumerate(positional):
        if index:
            yield _parameter(each.arg, "POSITIONAL_OR_KEYWORD", index >= required)
    if args.vararg:
        yield _parameter(args.vararg.arg, "VAR_POSITIONAL", False)
    for each, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _parameter(each.arg, "KEYWORD_ONLY", default is not None)
    if args.kwarg:
        yield _parameter(args.kwarg.arg, "VAR_KEYWORD", False)


def _parameter(name: str, kind: str, has_default: bool) -> dict[str, object]:
    return {"name": name, "kind": kind, "has_default": has_default}


if __name__ == "__main__":
    raise SystemExit(main())
