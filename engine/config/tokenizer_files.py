"""Tokenizer files: what each must hold, checked before the tokenizer is made of them.

transformers and tokenizers compute with the files before they check them, and their errors name
neither file nor key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.config.checkpoint_files import is_there, read_json_object, read_text, why_unreadable

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_JSON = (
    "config.json",  # decides the tokenizer's class
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "chat_template.json"),
)
_TEXT = ("merges.txt", "vocab.txt", "chat_template.jinja")
_MAY_BE_EMPTY = ("merges.txt", "chat_template.jinja")
_SENTENCEPIECE = "tokenizer.model"
_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Mapping) and isinstance(value.get("content"), str)
    )


def _is_tokens(value: Any) -> bool:
    each = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | list) and all(map(_is_token, each))


def _is_template(value: Any) -> bool:
    named = value if isinstance(value, list) else [value]
    return isinstance(value, str | Mapping) or all(
        isinstance(each, Mapping) and {"name", "template"} <= each.keys() for each in named
    )


def _is_added(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        str(key).isdigit() and _is_token(token) and not isinstance(token, str)
        for key, token in value.items()
    )


_Rule = tuple[str, Callable[[Any], bool]]  # completes "must be ...", and holds
_TOKEN: _Rule = ("text, or an object with its content", _is_token)
_TOKENS: _Rule = ("a list of tokens, each text or an object with its content", _is_tokens)
_SIDE: _Rule = ("left or right", lambda value: value in ("left", "right"))
_CLASS: _Rule = ("text", lambda value: isinstance(value, str))
_SPECIAL: dict[str, _Rule] = {
    **{f"{kind}_token": _TOKEN for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")},
    "additional_special_tokens": _TOKENS,
    "extra_special_tokens": _TOKENS,
}
_KEYS: dict[str, dict[str, _Rule]] = {
    "tokenizer_config.json": {
        **_SPECIAL,
        "added_tokens_decoder": ("an object of token ids to objects with content", _is_added),
        "chat_template": ("text, or a list of objects with name and template", _is_template),
        "model_max_length": (
            "a number",
            lambda value: isinstance(value, int | float) and not isinstance(value, bool),
        ),
        "tokenizer_class": _CLASS,
        "auto_map": ("an object", lambda value: isinstance(value, Mapping)),
        "padding_side": _SIDE,
        "truncation_side": _SIDE,
        "model_input_names": (
            "a list of text",
            lambda value: isinstance(value, list) and all(isinstance(i, str) for i in value),
        ),
    },
    "special_tokens_map.json": _SPECIAL,
    "tokenizer.json": {
        "model": ("an object", lambda value: isinstance(value, Mapping)),
        "added_tokens": (
            "a list of objects with content",
            lambda value: (
                isinstance(value, list)
                and all(isinstance(each, Mapping) and _is_token(each) for each in value)
            ),
        ),
    },
    "chat_template.json": {"chat_template": ("text", lambda value: isinstance(value, str))},
}
_NEEDED = {"tokenizer.json": ("model", "added_tokens")}
_NEVER_NULL = ("added_tokens_decoder", "auto_map", "model_input_names", "padding_side")


def check_tokenizer_files(folder: Path) -> None:
    """Check that the tokenizer files of a folder can be read and hold what they should.

    Raises:
        ValueError: naming file, key and value, or the reason why it cannot be read.
    """
    for name in (*_JSON, *_TEXT, _SENTENCEPIECE):
        path = folder / name
        if not is_there(path):
            continue
        if name in _JSON:
            _check_keys(path, read_json_object(path))
        elif name in _TEXT:
            read_text(path, may_be_empty=name in _MAY_BE_EMPTY)
        else:
            _check_sentencepiece(path, is_used=not is_there(folder / "tokenizer.json"))


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    for key in _NEEDED.get(path.name, ()):
        if key not in values:
            raise ValueError(f"{path} has no {key!r}, so it is no tokenizer; download it again")
    rules: Iterable[tuple[str, _Rule]] = _KEYS.get(path.name, {}).items()
    if path.name in ("added_tokens.json", "vocab.json"):
        rule = ("a token id", lambda value: type(value) is int and value >= 0)
        rules = [(key, rule) for key in values]
    for key, (text, holds) in rules:
        if key not in values:
            continue
        value = values[key]
        may_be_null = path.name in ("tokenizer_config.json", "special_tokens_map.json")
        is_null = value is None and may_be_null and key not in _NEVER_NULL
        if not is_null and not holds(value):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
            raise ValueError(
                f"{path}: {key} = {shown}: must be {text}; download the file again, or correct it"
            )


def _check_sentencepiece(path: Path, *, is_used: bool) -> None:
    why = why_unreadable(path)
    if not why and path.stat().st_size == 0:
        why = "is empty; download it again"
    if why:
        raise ValueError(f"{path} {why}")
    with path.open("rb") as file:
        is_pointer = file.read(32).startswith(b"version https://git-lfs")
    if is_pointer:
        raise ValueError(f"{path} is a Git LFS pointer: run `git lfs pull` in its folder")
    missing = [name for name, module in _PACKAGES.items() if not _has(module)]
    if is_used and missing:
        names = " and ".join(missing)
        raise ValueError(
            f"{path} is a SentencePiece model, which needs {names}: pip install "
            f"{' '.join(missing)}, or use a tokenizer with a tokenizer.json"
        )


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
