"""engine/generation/tokenizer.py: tokenizers that cannot be read, and those that are code."""

import json

import pytest

from engine.config import ModelConfig
from engine.generation.tokenizer import has_tokenizer, load_tokenizer


def refusal(folder) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(ModelConfig(path="unused", tokenizer=str(folder)))
    return str(caught.value)


def test_a_tokenizer_that_is_code_is_refused_without_advice_to_run_it(tmp_path):
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    text = refusal(tmp_path)
    assert text.startswith(f"model.tokenizer: the tokenizer in {tmp_path} is code of its own")
    assert "name one with a tokenizer.json" in text and "trust_remote_code" not in text


def test_a_folder_without_a_tokenizer_is_refused_by_its_name(tmp_path):
    assert f"{str(tmp_path)!r} holds none of tokenizer.json" in refusal(tmp_path)


def test_whether_there_is_a_tokenizer_is_known_without_loading_it(tmp_path):
    assert not has_tokenizer(ModelConfig(path=str(tmp_path)))
    assert has_tokenizer(ModelConfig(path=str(tmp_path), tokenizer="anywhere"))
    (tmp_path / "tokenizer.model").touch()
    assert has_tokenizer(ModelConfig(path=str(tmp_path)))
