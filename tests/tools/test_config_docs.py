"""docs/configuration.md: what tools/config_docs.py writes, and that the page is current."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import config_docs
import pytest

from engine.config import CapacityConfig, Config, ModelConfig
from engine.config.validation import type_hints


def sections(section: type = Config) -> list[type]:
    """Every dataclass of settings, from the outside."""
    inner = [hint for hint in type_hints(section).values() if is_dataclass(hint)]
    return [section, *(each for hint in inner for each in sections(hint))]


def test_the_page_is_generated_from_the_current_schema():
    assert config_docs.main(["--check"]) == 0, "run `python tools/config_docs.py`"


def test_a_page_that_is_not_current_is_reported_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config_docs, "ROOT", tmp_path)
    monkeypatch.setattr(config_docs, "PAGE", tmp_path / "configuration.md")
    assert config_docs.main(["--check"]) == 1
    assert "run `python tools/config_docs.py`" in capsys.readouterr().err
    assert config_docs.main([]) == 0 and config_docs.main(["--check"]) == 0


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_has_a_comment_on_what_it_does(section):
    comments = config_docs.field_comments(section)
    assert set(comments) == {item.name for item in fields(section)}
    keys = [name for name, hint in type_hints(section).items() if not is_dataclass(hint)]
    assert all(comments[key] for key in keys), comments


def test_a_row_has_key_default_allowed_values_and_the_whole_comment():
    page = config_docs.page()
    row = "| `path` | required | non-empty text | a local Hugging Face checkpoint directory |"
    assert row in page
    assert "| `expert` | `null` | a whole number, at least 1, or `auto`, or `null` | ranks" in page
    assert "| `phases` | `[prefill]` | a list of phases, not empty and without repeats |" in page
    assert "| `prefix_cache` | `auto` | true or false, or `auto` | run the" in page
    assert "| `policy` | `none` | `none`, `token_drop`, `expanded_drop` | token_drop:" in page
    assert config_docs.field_comments(ModelConfig)["dtype"].endswith("the checkpoint's own on CUDA")
    assert "\n" not in config_docs.field_comments(CapacityConfig)["factor"]
