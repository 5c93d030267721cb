"""What docstrings and comments name exists: files in backticks, and settings of the schema.

Run: pytest tests/unit/test_docstrings.py
"""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import subprocess
import tokenize
from pathlib import Path

from engine.config import Config

ROOT = Path(__file__).resolve().parents[2]
FILE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|sh|sbatch|md|yaml|cpp|h|c|js|html|css))`")
SETTING = re.compile(
    r"(?<![\w.])((?:model|parallel|moe|scheduler|sampling|profiler|runtime)(?:\.(?!py\b)\w+)+)"
)
# Files that a user or a test makes, not the repository.
MADE_BY_USERS = {"my_job.py"}
# Tensors, files and attributes whose names begin as settings do.
NOT_SETTINGS = re.compile(r"model\.layers|model\.safetensors|moe\.submodules")


def tracked() -> list[Path]:
    """Every file that git tracks or would track."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.splitlines() if (ROOT / name).is_file()]


TRACKED = tracked()
SOURCES = [path for path in TRACKED if path.suffix == ".py"]


def prose_of(path: Path) -> str:
    """All docstrings and comments of a Python file."""
    source = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        text
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and (text := ast.get_docstring(node))
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(found)


def missing_files(prose: str, known: set[str]) -> set[str]:
    """Files named in backticks that no path of `known` is, or ends in."""
    named = set(FILE.findall(prose)) - MADE_BY_USERS
    return {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in known)}


def test_every_file_that_a_docstring_names_exists():
    known = {str(each.relative_to(ROOT)) for each in TRACKED}
    known |= {path.replace("kernels/", "engine/ops/", 1) for path in known}  # the same folder
    wrong = {
        str(path.relative_to(ROOT)): missing
        for path in SOURCES
        if (missing := missing_files(prose_of(path), known))
    }
    assert wrong == {}


def test_a_file_that_is_not_there_is_found():
    known = {"engine/moe/layer.py"}
    assert missing_files("see `layer.py`, `moe/layer.py`, `ayer.py`", known) == {"ayer.py"}


def settings(cls: type, prefix: str = "") -> set[str]:
    """Every setting and section of the schema, by its dotted name."""
    found = set()
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        found.add(name)
        default = field.default_factory if callable(field.default_factory) else None
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            found |= settings(default, f"{name}.")
    return found


def test_every_setting_that_a_docstring_of_the_engine_names_exists():
    known = settings(Config) | {f"model.{name}" for name in ("path", "tokenizer", "dtype")}
    known |= {f"model.{name}" for name in ("load_format", "max_model_len", "quantization")}
    known.add("model.implementation")
    wrong = {}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "engine"):
            named = [
                name for name in SETTING.findall(prose_of(path)) if not NOT_SETTINGS.match(name)
            ]
            if unknown := set(named) - known:
                wrong[str(path.relative_to(ROOT))] = unknown
    assert wrong == {}
