"""engine/generation/tokenizer.py: tokenizers that cannot be read or are code; prompts to ids."""

import json

import pytest

from engine.config import ModelConfig
from engine.generation.prompt_encoder import PromptEncoder
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


class Letters:
    """One token per character, its code point."""

    def __call__(self, text):
        return {"input_ids": [ord(c) for c in text]}

    def convert_ids_to_tokens(self, token):
        return chr(token)


ENCODER = PromptEncoder(Letters(), 128, 32)


def test_a_text_and_its_token_ids_are_the_same_prompt():
    assert list(ENCODER.encode("p", "ab")) == list(ENCODER.encode("p", (97, 98))) == [97, 98]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([1, 128], "p[1] = 128: must be from 0 to 127, the model's vocabulary"),
        ([-1], "p[0] = -1: must be from 0 to 127, the model's vocabulary"),
        ([], "p: is empty and has no tokens; give at least one token"),
        ("", "p: is empty; give at least one token"),
        ("a\udfff", "p: character 1 is half of a surrogate pair, which is no text"),
        (7, "p = 7: must be text or a list of token ids"),
        (["a"], 'p[0] = "a": must be a whole number (a token id), one prompt at a time'),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_by_its_name(prompt, text):
    with pytest.raises(ValueError) as caught:
        ENCODER.encode("p", prompt)
    assert str(caught.value) == text


def test_a_token_that_the_model_has_not_is_named_as_the_tokenizer_writes_it():
    with pytest.raises(ValueError, match=r"^p: its token 1 \('é'\) has the id 233, .* 0 to 127"):
        ENCODER.encode("p", "aé")


def test_text_without_a_tokenizer_is_refused_and_token_ids_are_not():
    encoder = PromptEncoder(None, 128, 32)
    assert list(encoder.encode("p", [5])) == [5]
    with pytest.raises(ValueError, match="^p: needs a tokenizer .* model.tokenizer"):
        encoder.encode("p", "ab")


def test_whether_there_is_a_tokenizer_is_known_without_loading_it(tmp_path):
    assert not has_tokenizer(ModelConfig(path=str(tmp_path)))
    assert has_tokenizer(ModelConfig(path=str(tmp_path), tokenizer="anywhere"))
    (tmp_path / "tokenizer.model").touch()
    assert has_tokenizer(ModelConfig(path=str(tmp_path)))
