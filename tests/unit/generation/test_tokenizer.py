"""engine/generation/tokenizer.py: tokenizers that cannot be read or are code; prompts to ids."""

import json
import shutil
from pathlib import Path

import pytest

from engine.config import ModelConfig, tokenizer_files
from engine.generation.prompt_encoder import PromptEncoder
from engine.generation.tokenizer import has_tokenizer, load_tokenizer
from tests.helpers.batch_case import make_model


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


def test_a_checkpoint_whose_tokenizer_is_code_alone_takes_token_ids(tmp_path):
    (tmp_path / "tiktoken.model").touch()
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    config = ModelConfig(path=str(tmp_path))
    assert not has_tokenizer(config) and load_tokenizer(config) is None
    del settings["auto_map"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert has_tokenizer(config)


def test_a_folder_without_a_tokenizer_is_refused_by_its_name(tmp_path):
    assert f"{str(tmp_path)!r} holds none of tokenizer.json" in refusal(tmp_path)


def copied(tmp_path_factory, folder) -> None:
    """Make a small model's tokenizer in a folder."""
    if not MADE:
        MADE.append(tmp_path_factory.mktemp("tokenizer"))
        make_model(MADE[0])
    shutil.copytree(MADE[0], folder, dirs_exist_ok=True)


MADE: list[Path] = []  # by the first test that needs it


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "tokenizer.model",
    ],
)
def test_a_tokenizer_file_that_cannot_be_read_is_named_in_one_line(
    tmp_path, tmp_path_factory, name
):
    copied(tmp_path_factory, tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    wrong = {"is a link to gone, which does not exist": lambda: path.symlink_to("gone")}
    wrong["is a folder and must be a file"] = path.mkdir
    if name != "chat_template.jinja":  # which is needed for messages alone
        wrong["is empty"] = path.touch
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    wrong["is a Git LFS pointer"] = lambda: path.write_bytes(lfs)
    if name != "tokenizer.model":
        wrong["is not UTF-8"] = lambda: path.write_bytes(b'{"a": "\xff"}')
    if name.endswith(".json"):
        wrong["is not valid JSON"] = lambda: path.write_text('{"a": ')
        wrong["must hold one JSON object, and holds a list"] = lambda: path.write_text("[]")
        wrong["must hold one JSON object, and holds text"] = lambda: path.write_text('"x"')
    for text, make in wrong.items():
        make()
        message = refusal(tmp_path)
        assert f"model.tokenizer: {path} {text}" in message and "\n" not in message
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token = 5: must be text, or an object"),
        ("tokenizer_config.json", {"pad_token": {"a": 1}}, 'pad_token = {"a": 1}: must be text'),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder = []: must"),
        ("tokenizer_config.json", {"padding_side": None}, "padding_side = null: must be left or"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template = 7: must be text, or a l"),
        ("tokenizer_config.json", {"model_max_length": "x"}, 'model_max_length = "x": must be a'),
        ("tokenizer_config.json", {"tokenizer_class": []}, "tokenizer_class = []: must be text"),
        ("special_tokens_map.json", {"bos_token": [1]}, "bos_token = [1]: must be text, or an o"),
        ("special_tokens_map.json", {"additional_special_tokens": "<x>"}, 'tokens = "<x>": must'),
        ("added_tokens.json", {"<x>": "300"}, '<x> = "300": must be a token id'),
        ("tokenizer.json", {"model": 5}, "model = 5: must be an object"),
        ("tokenizer.json", {"added_tokens": None}, "added_tokens = null: must be a list of obj"),
        ("tokenizer.json", {"model": {}}, "ModelUntagged at line 1"),
        ("tokenizer.json", {"version": "9"}, "Unknown tokenizer version '9'"),
    ],
)
def test_a_wrong_value_in_a_tokenizer_file_is_named_by_file_and_key(
    tmp_path, tmp_path_factory, name, values, text
):
    copied(tmp_path_factory, tmp_path)
    path = tmp_path / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))
    message = refusal(tmp_path)
    assert str(path) in message and text in message and "\n" not in message


def test_a_sentencepiece_model_without_its_packages_names_them(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"some model")
    monkeypatch.setattr(tokenizer_files, "_has", lambda module: module != "sentencepiece")
    text = refusal(tmp_path)
    assert f"{tmp_path / 'tokenizer.model'} is a SentencePiece model, which needs senten" in text
    assert "pip install sentencepiece, or use a tokenizer with a tokenizer.json" in text


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"the cat {number} sat on the mat {number * 7}" for number in range(300)]
    (tmp_path / "lines").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    ids = tokenizer("the cat sat on")["input_ids"]
    assert len(ids) < 8 and tokenizer.decode(ids, skip_special_tokens=True) == "the cat sat on"


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
