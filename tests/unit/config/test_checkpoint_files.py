"""engine/config/checkpoint_files.py: files that cannot be used are named with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.config.checkpoint_files import read_json_object, why_unreadable
from engine.config.preflight import check_runnable


def refusal(folder: Path) -> str:
    config = Config(model=ModelConfig(path=str(folder)), runtime=RuntimeConfig(device="cpu"))
    with pytest.raises(ValueError) as caught:
        check_runnable(config, {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["consolidated.00.pth"], "consolidated.00.pth: weights in the format of their authors'"),
        (
            ["consolidated.safetensors", "params.json"],
            "though consolidated.safetensors: weights in the format of their authors' own code",
        ),
        (["adapter_model.safetensors"], "holds an adapter (adapter_model.safetensors) and not"),
        (["adapter_model.bin"], "holds an adapter (adapter_model.bin) and not the model"),
        (["pytorch_model.bin", "training_args.bin"], "only pickled weights (pytorch_model.bin)"),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            "holds only pickled weights (pytorch_model-00001-of-00002.bin, pytorch_model-00002",
        ),
        (["model.fp16.safetensors"], "though the variant model.fp16.safetensors: rename it to mod"),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
            "rename it to model.safetensors (and shards and index alike)",
        ),
        (["model-00001-of-00002.safetensors"], "and no model.safetensors.index.json; download it"),
        (["other.safetensors"], "though other.safetensors is there: add an index, or rename it"),
        (["tiny.Q4_K_M.gguf"], "holds GGUF weights (tiny.Q4_K_M.gguf), which are not read"),
        (["tf_model.h5"], "holds TensorFlow weights (tf_model.h5), which are not read"),
        ([], "holds neither model.safetensors nor model.safetensors.index.json; point model.path"),
    ],
)
def test_what_a_folder_holds_instead_of_weights_is_said_with_what_to_do(tmp_path, names, text):
    for name in ["config.json", *names]:
        (tmp_path / name).write_text("{}")
    message = refusal(tmp_path)
    assert text in message and f"model.path = {str(tmp_path)!r}: " in message


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_a_link_to_a_blob_that_is_missing_is_found_before_anything_is_loaded(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("../../blobs/0123abcd")
    text = refusal(tmp_path)
    assert f"{name} is a link to ../../blobs/0123abcd, which does not exist" in text
    assert "cp -rL" in text


def test_a_folder_without_permission_is_not_said_to_lack_files(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"model.path = {str(tmp_path)!r}: the folder cannot be read: Perm" in refusal(tmp_path)


def test_every_reason_is_said_in_words(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    assert why_unreadable(path) == "does not exist; download it"
    path.mkdir()
    assert why_unreadable(path).startswith("is a folder and must be a file")
    path.rmdir()
    os.mkfifo(path)
    assert why_unreadable(path).startswith("is no regular file")
    path.unlink()
    path.write_text("{}")
    assert why_unreadable(path) == ""

    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)
    assert why_unreadable(path) == (
        "cannot be read: Permission denied; make it readable for this user"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "is not valid JSON (Expecting property name enclosed in double quotes: line 1"),
        (b'{"a": [1, 2', "as if cut off; download or copy it again"),
        (b"\xff\xfe{", "is not UTF-8 (byte 0 is 0xff)"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "must hold one JSON object, and holds a list"),
        (b"null", "must hold one JSON object, and holds null"),
        (b"7", "must hold one JSON object, and holds 7"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_json_object_is_named_with_the_reason(tmp_path, content, text):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json_object(path)
    assert str(caught.value).startswith(f"{path} ") and text in str(caught.value)
    assert "\n" not in str(caught.value)
