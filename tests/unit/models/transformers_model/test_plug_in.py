"""Plug-in points of transformers: what happens where a version has moved one.

Run: pytest tests/unit/models/transformers_model/test_plug_in.py
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.models.registry import read_config
from engine.models.transformers_model import plug_in as plug_in_module
from engine.models.transformers_model.plug_in import VERSIONS, plug_in
from engine.models.transformers_model.spec import _probed
from tests.helpers.model_cases import CASES
from tests.helpers.transformers_cases import FOREIGN_CASES

ROOT = Path(__file__).resolve().parents[4]
# Of what is imported, that which is used of it, besides.
MEMBERS = [
    ("transformers.configuration_utils", "PretrainedConfig.get_text_config"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS.register"),
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS.register"),
    *(
        ("transformers.modeling_utils", f"PreTrainedModel.{name}")
        for name in plug_in_module._OF_MODELS
    ),
]


def imported() -> list[tuple[str, str]]:
    """Return modules of transformers and the names that the engine's module takes from them."""
    tree = ast.parse(Path(plug_in_module.__file__).read_text(encoding="utf-8"))
    found = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
        for alias in node.names
    ]
    # The bases of all configurations and models, without which there is no transformers.
    bases = ("PretrainedConfig", "PreTrainedModel")
    return sorted({(str(module), name) for module, name in found if name not in bases})


ALL = [*imported(), *MEMBERS]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing of it is remembered, before the test and after."""
    for each in (plug_in, _probed):
        each.cache_clear()
    yield
    for each in (plug_in, _probed):
        each.cache_clear()


def move(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    """Take what a version has renamed out of it."""
    holder: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    if parents and not isinstance(holder, type):  # an object whose class has it
        holder = type(holder)
    if parents:
        holder = next(each for each in holder.__mro__ if last in vars(each))
    if module == "transformers":  # a lazy module would find it again
        table = holder.__dict__.setdefault("_objects", {})
        monkeypatch.delitem(holder._class_to_module, last, raising=False)
        monkeypatch.delitem(table, last, raising=False)
        getattr(holder, last, None)
        monkeypatch.delitem(vars(holder), last, raising=False)
        return
    monkeypatch.delattr(holder, last)


def check_sentence(text: str) -> None:
    assert text.startswith(f"model.implementation: transformers {transformers.__version__} has not")
    assert text.count(f"install transformers {VERSIONS}") == 1 and "\n" not in text
    assert "model.implementation = lockstep" in text and "Traceback" not in text


@pytest.mark.parametrize(("module", "name"), ALL, ids=[name for _, name in ALL])
def test_a_point_that_was_moved_is_one_sentence_with_the_versions(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FOREIGN_CASES["dots1"].config().save_pretrained(tmp_path)
    read_config(tmp_path)  # modules of the model are imported, as their own version has them
    plug_in.cache_clear()
    _probed.cache_clear()
    move(monkeypatch, module, name)
    with pytest.raises(ValueError, match="model.implementation") as raised:
        read_config(tmp_path, "transformers")
    check_sentence(str(raised.value))
    assert name.rpartition(".")[2] in str(raised.value)


def test_other_arguments_of_a_point_are_the_same_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = importlib.import_module("transformers.core_model_loading")
    monkeypatch.setattr(loading, "rename_source_key", lambda source_key, transforms: None)
    with pytest.raises(ValueError, match="model.implementation") as raised:
        plug_in()
    check_sentence(str(raised.value))


def test_other_marks_of_experts_are_the_same_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = importlib.import_module("transformers.integrations.moe")
    monkeypatch.setattr(moe, "use_experts_implementation", lambda experts, has_glu=True: experts)
    with pytest.raises(ValueError, match="model.implementation") as raised:
        plug_in()
    check_sentence(str(raised.value))
    assert "has_gate" in str(raised.value)


# transformers itself cannot read a configuration without that method.
@pytest.mark.parametrize(
    ("module", "name"), [each for each in ALL if not each[1].endswith("get_text_config")]
)
def test_a_family_of_this_engine_needs_none_of_the_points(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    CASES["mixtral"].config().save_pretrained(tmp_path)
    move(monkeypatch, module, name)
    assert read_config(tmp_path).model_type == "mixtral"


_RENAMED = """
import sys
import transformers.masking_utils as masks
masks.ALL_MASKS = masks.__dict__.pop("ALL_MASK_ATTENTION_FUNCTIONS")
sys.argv[1:] = ["check-model", *sys.argv[1:]]
from lockstep import cli
cli.run_and_exit()
"""


@pytest.mark.long
def test_in_a_fresh_process_the_command_prints_the_sentence_and_runs_our_own(
    tmp_path: Path,
) -> None:
    found = {}
    for case in (FOREIGN_CASES["dots1"], CASES["mixtral"]):
        folder = tmp_path / case.family
        case.config().save_pretrained(folder)
        result = subprocess.run(
            [sys.executable, "-c", _RENAMED, str(folder), "--json", "--ranks", "1"],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'launch'}{os.pathsep}{ROOT}"},
        )
        assert result.returncode == 1, result.stderr  # the files of the weights are missing
        found[case.family] = json.loads(result.stdout)["problems"]
    check_sentence(found["Dots1"][0])
    assert not any("transformers" in problem for problem in found["Mixtral"])
