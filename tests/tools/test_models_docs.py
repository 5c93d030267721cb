"""docs/models.md: that the page is current, and that its rows are true.

Run: pytest tests/tools/test_models_docs.py
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import models_docs
import pytest
import transformers
from model_table.configurations import Configuration
from model_table.rows import reason_of, row_of, try_out

from engine.models.model_types import supported_model_types
from tests.helpers.model_cases import CASES
from tests.helpers.transformers_cases import FOREIGN_CASES

ALL_CASES = {**CASES, **FOREIGN_CASES}
SOURCES = Path(transformers.__file__).parent / "models"
known_version = pytest.mark.skipif(
    not models_docs.is_known_version(), reason="the page is about another version of transformers"
)


@cache
def section(title: str) -> dict[str, list[str]]:
    """A table of the page: model type -> cells."""
    _, _, rest = models_docs.PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")
    lines = re.findall(r"^\| `([^`]*)` \| (.*) \|$", rest.partition("\n## ")[0], re.M)
    return {name: cells.split(" | ") for name, cells in lines if name != "model_type"}


@known_version
@pytest.mark.long
def test_the_page_is_what_the_engine_does_now():
    assert models_docs.main(["--check"]) == 0, f"run `{models_docs.COMMAND}`"


@pytest.mark.parametrize("case", ALL_CASES)
def test_every_model_with_a_parity_test_is_said_to_run(case):
    model_type = ALL_CASES[case].config().model_type
    cells = section("What runs")[model_type]
    first = next(name for name in ALL_CASES if ALL_CASES[name].config().model_type == model_type)
    assert f"`{first}`" in cells[-1]


@known_version
def test_every_family_whose_experts_transformers_can_exchange_is_in_the_table():
    """Found in the text of its modules, not in its configurations."""
    named = section("What runs").keys() | section("What is refused").keys()
    families = [
        file.parent
        for file in sorted(SOURCES.glob("*/modeling_*.py"))
        if "@use_experts_implementation" in file.read_text(encoding="utf-8")
    ]
    assert len(families) > 40
    for folder in families:
        texts = [file.read_text(encoding="utf-8") for file in folder.glob("configuration_*.py")]
        types = {each for text in texts for each in re.findall(r'model_type = "(.*?)"', text)}
        assert types & named, folder.name


def test_every_family_of_this_engine_is_in_the_table():
    assert set(supported_model_types()) <= section("What runs").keys()


def test_no_model_both_runs_and_is_refused():
    assert not section("What runs").keys() & section("What is refused").keys()


def test_a_row_has_who_builds_the_model_and_what_capacity_can_do():
    ours = row_of(Configuration("mixtral", CASES["mixtral"].config(), ("mixtral",)))
    assert ours.refusal is None and not ours.by_transformers and ours.also
    assert ours.policies == ("token_drop", "expanded_drop")
    theirs = row_of(Configuration("dots1", FOREIGN_CASES["dots1"].config()))
    assert theirs.refusal is None and theirs.by_transformers
    assert "token_drop" in theirs.policies
    # The page has the same of both.
    for row in (ours, theirs):
        cells = section("What runs")[row.model_type]
        assert row.scores in cells and ", ".join(f"`{name}`" for name in row.policies) in cells


@pytest.mark.parametrize("model_type", ["jamba", "switch_transformers", "inkling_mm_model"])
def test_the_reason_of_a_row_is_the_reason_of_the_refusal(model_type):
    config = transformers.CONFIG_MAPPING[model_type]()
    found = try_out(model_type, config, "auto")
    assert isinstance(found, str)
    assert section("What is refused")[model_type][-1] == found


def test_the_reason_has_neither_the_path_nor_a_version_nor_what_to_use_instead():
    version = transformers.__version__
    sentence = (
        "model.path = '/a b': config.json has model_type = 'x', which this engine cannot run with "
        f"transformers' implementation: transformers {version} has no y; use a checkpoint of one "
        "of mixtral, olmoe"
    )
    assert reason_of(sentence) == "transformers has no y"


def test_with_another_version_of_transformers_the_page_is_not_written(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.24.0")
    with pytest.raises(SystemExit, match=r"is about transformers 5\.23, and 5\.24\.0 is installed"):
        models_docs.page()
