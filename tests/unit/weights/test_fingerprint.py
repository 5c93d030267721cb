"""The fingerprint of a checkpoint: which files count, that a change of any is named, what is read.

python -m pytest tests/unit/weights/test_fingerprint.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.config import ModelConfig
from engine.weights import fingerprint as module
from engine.weights.fingerprint import changed_files, fingerprint, model_fingerprint

TEXTS = {
    "config.json": '{"model_type": "mixtral"}',
    "hf_quant_config.json": '{"quantization": {"quant_algo": "FP8"}}',
    "generation_config.json": '{"eos_token_id": 1}',
    "tokenizer.json": '{"model": {}}',
    "tokenizer.model": "pieces",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two weight files."""
    path = tmp_path / "model"
    (path / "additional_chat_templates").mkdir(parents=True)
    for name, text in TEXTS.items():
        (path / name).write_text(text)
    for number, name in enumerate(SHARDS):
        save_file({f"w{number}": torch.full((64, 64), float(number))}, path / name)
    weight_map = {f"w{number}": name for number, name in enumerate(SHARDS)}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (path / "README.md").write_text("about")
    return path


def model(folder: Path, **settings) -> ModelConfig:
    return ModelConfig(path=str(folder), **settings)


def changes(before: dict, folder: Path, **settings) -> list[str]:
    paths = {"model.path": str(folder), "model.tokenizer": settings.get("tokenizer")}
    return changed_files(before, fingerprint(model(folder, **settings)), paths)


@pytest.mark.parametrize("name", [*TEXTS, INDEX, *SHARDS])
def test_a_file_that_was_replaced_is_named_also_with_its_size_unchanged(folder, name):
    before = fingerprint(model(folder))
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    # An index that names other files also changes which of them count.
    (first, *others) = changes(before, folder)
    assert first.startswith(f"{folder / name} was replaced: it was {len(data)} bytes, sha256 ")
    assert name == INDEX or others == []


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_appeared_or_is_gone_is_named(folder, name):
    whole = fingerprint(model(folder))
    (folder / name).unlink()
    without = fingerprint(model(folder))
    paths = {"model.path": str(folder)}
    assert changed_files(whole, without, paths) == [
        f"{folder / name} was there when the job began and is missing"
    ]
    assert changed_files(without, whole, paths) == [
        f"{folder / name} was not there when the job began"
    ]


def test_a_copy_is_equal_and_what_makes_no_result_does_not_count(folder, tmp_path):
    before = fingerprint(model(folder))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("more about")
    (tmp_path / "copy" / "metrics.json").write_text("{}")
    (tmp_path / "copy" / "unused.safetensors").write_bytes(b"not in the index")
    os.utime(tmp_path / "copy" / SHARDS[0], (1, 1))
    assert changes(before, tmp_path / "copy") == []


def test_a_tokenizer_of_its_own_counts_instead_of_the_models(folder, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    before = fingerprint(model(folder, tokenizer=str(other)))
    (folder / "tokenizer.json").write_text("changed")
    assert changes(before, folder, tokenizer=str(other)) == []
    (other / "tokenizer.json").write_text("[]")
    (only,) = changes(before, folder, tokenizer=str(other))
    assert only.startswith(f"{other / 'tokenizer.json'} was replaced")


def test_weight_files_do_not_count_where_weights_are_random(folder):
    names = fingerprint(model(folder, load_format="dummy"))
    assert not [name for name in names if "safetensors" in name]
    assert "model.path/config.json" in names


def test_a_single_file_counts_before_an_index_as_in_loading(folder):
    shutil.copy(folder / SHARDS[0], folder / "model.safetensors")
    names = fingerprint(model(folder))
    assert [name for name in names if "safetensors" in name] == ["model.path/model.safetensors"]


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_what_loading_reports_is_no_error_here(folder, index):
    (folder / INDEX).write_text(index)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "nothing")
    assert f"model.path/{INDEX}" in fingerprint(model(folder))
    assert fingerprint(ModelConfig(path=str(folder / "nowhere"))) == {}


def test_of_many_files_the_first_are_named_and_the_others_counted():
    before = {f"model.path/model-{i}.safetensors": {"size": 1, "sha256": "a"} for i in range(9)}
    now = {name: {"size": 1, "sha256": "b"} for name in before}
    found = changed_files(before, now, {"model.path": "m"})
    assert len(found) == 6 and found[-1] == "4 more files differ"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint of one weight file that is sampled: 40 MiB, with two small tensors inside."""
    path = tmp_path / "large"
    path.mkdir()
    torch.manual_seed(0)
    tensors = {f"expert.{i}": torch.randn(5 << 20) for i in range(2)}
    tensors |= {"norm": torch.randn(100), "router": torch.randn(8, 512)}
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", ["expert.0", "expert.1", "norm", "router"])
def test_in_a_large_file_another_tensor_is_noticed_whichever_it_is(large, name):
    from safetensors.torch import load_file

    before = fingerprint(model(large))
    tensors = load_file(large / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file({key: value.clone() for key, value in tensors.items()}, large / "model.safetensors")
    (only,) = changes(before, large)
    assert "model.safetensors was replaced" in only


def test_of_a_large_file_at_most_4_mib_are_read(large, monkeypatch):
    read, pread = [], os.pread

    def counting(fd: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(fd, length, offset)

    monkeypatch.setattr(module.os, "pread", counting)
    fingerprint(model(large))
    assert 1 << 20 < sum(read) <= 4 << 20


def test_a_model_is_known_by_its_weights_and_configuration_wherever_it_is(folder, tmp_path):
    known = model_fingerprint(model(folder))
    assert len(known) == 16 and int(known, 16) >= 0
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert model_fingerprint(model(tmp_path / "copy")) == known
    data = bytearray((tmp_path / "copy" / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (tmp_path / "copy" / SHARDS[1]).write_bytes(data)
    other = model_fingerprint(model(tmp_path / "copy"))
    dummy = model_fingerprint(model(folder, load_format="dummy"))
    assert len({known, other, dummy}) == 3
    assert dummy == model_fingerprint(model(tmp_path / "copy", load_format="dummy"))
