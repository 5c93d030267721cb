"""Fingerprint: the files of a checkpoint that make a job's results, each with size and hash.

Part of the manifest (`batch/manifest.py`): records that are made before and after a file was
replaced are of two models, so a job with another fingerprint is not resumed. Files that no result
depends on, such as a README, are not part of it, nor are times of modification, which a copy
changes.

Small files and those of the tokenizer are hashed whole. A larger one is sampled, at most 4 MiB of
it: the beginning with its header, blocks at equal distances up to the end, and the middle of its
smallest tensors, which such blocks miss (norms, routers). A checkpoint of 100 GB takes some
thousand reads; the reads of several files run at once, because each waits for the file system.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.distributed.health.progress import OnProgress, ignore_progress
from engine.weights.formats.scheme import MODELOPT
from engine.weights.safetensors_header import INDEX, SINGLE, CheckpointError, read_header

_TOKENIZER_PATTERNS = (
    *(f"{stem}*{suffix}" for stem in ("tokenizer", "vocab") for suffix in (".json", ".txt")),
    *("*.model", "*.tiktoken", "tekken.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja"),
)
_WHOLE_BYTES = 16 << 20  # weight files up to this size are hashed whole
_WHOLE_TEXT_BYTES = 128 << 20  # other files; tokenizers of tens of MB exist
_HEADER_BYTES = 1 << 20
_NUM_BLOCKS, _BLOCK_BYTES = 64, 32 << 10
_NUM_TENSORS, _TENSOR_BYTES = 256, 4 << 10
_CHUNK = 1 << 20
_NUM_THREADS = 8
_MAX_SHOWN = 5


def fingerprint(model: ModelConfig, report: OnProgress = ignore_progress) -> dict[str, Any]:
    """Return the files that make results: name -> {"size", "sha256"}, JSON-ready.

    A name begins with the setting whose folder the file is in: `model.path/config.json`. The hash
    is null where a file cannot be read, and a file that is missing is left out: what needs the file
    reports it.

    Args:
        model: the config's section.
        report: called once per file.
    """
    found = dict(sorted(_files(model)))
    with ThreadPoolExecutor(_NUM_THREADS, "fingerprint") as pool:
        entries = {}
        for name, entry in zip(found, pool.map(_entry, found.values()), strict=True):
            report()
            if entry is not None:
                entries[name] = entry
    return entries


def model_fingerprint(model: ModelConfig) -> str:
    """Return 16 hexadecimal digits that identify the model of a config, wherever its files are.

    From its configuration and its weights alone: a tokenizer may be replaced.
    """
    names = ["config.json"]
    if model.load_format == "safetensors":
        names += _weight_files(Path(model.path))
        names += [MODELOPT] if Path(model.path, MODELOPT).exists() else []
    entries = {name: _entry(Path(model.path, name)) for name in names}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


def changed_files(
    before: Mapping[str, Any], now: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """Return a sentence for each file that differs between two fingerprints, replaced ones first.

    Args:
        before: the older fingerprint.
        now: the newer one.
        settings: by dotted name, with the folders of `now`.
    """
    found, both = [], before.keys() & now.keys()
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name not in both, name)):
        was, is_ = before.get(name), now.get(name)
        if was == is_:
            continue
        key, _, file = name.partition("/")
        path = Path(settings.get(key) or key, file)
        if was is None:
            found.append(f"{path} was not there when the job began")
        elif is_ is None:
            found.append(f"{path} was there when the job began and is missing")
        else:
            found.append(f"{path} was replaced: it was {_show(was)}, is {_show(is_)}")
    if len(found) > _MAX_SHOWN:
        found[_MAX_SHOWN:] = [f"{len(found) - _MAX_SHOWN} more files differ"]
    return found


def _show(entry: Any) -> str:
    try:
        return f"{entry['size']} bytes, sha256 {str(entry['sha256'])[:12]}"
    except (KeyError, TypeError):  # of a manifest that was edited
        return str(entry)


def _files(model: ModelConfig) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file that makes results; some may not exist."""
    folder = Path(model.path)
    names = ["config.json", "generation_config.json"]
    if model.load_format == "safetensors":
        names += [MODELOPT, *_weight_files(folder)]
    for name in names:
        yield f"model.path/{name}", folder / name
    key = "model.path"
    if model.tokenizer is not None:
        key, folder = "model.tokenizer", Path(model.tokenizer)
        yield f"{key}/config.json", folder / "config.json"  # decides the tokenizer's class
    for pattern in _TOKENIZER_PATTERNS:
        for path in folder.glob(pattern):
            yield f"{key}/{path.relative_to(folder).as_posix()}", path


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files with weights, as `read_catalog` chooses them."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        names = {str(name) for name in weight_map.values()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        names = set()  # loading reports it
    return [INDEX, *sorted(name for name in names if "\0" not in name)]


def _entry(path: Path) -> dict[str, Any] | None:
    """Return size and hash of a file, None where there is none."""
    try:
        if not path.is_file():
            return None
        size = path.stat().st_size
    except OSError:
        return None
    try:
        return {"size": size, "sha256": _hash(path, size)}
    except OSError:
        return {"size": size, "sha256": None}


def _hash(path: Path, size: int) -> str:
    """Return the hash of a file, or of samples where it is large. Raises OSError."""
    digest = hashlib.sha256()
    is_weights = path.suffix == ".safetensors"
    with path.open("rb", buffering=0) as file:
        if size <= (_WHOLE_BYTES if is_weights else _WHOLE_TEXT_BYTES):
            while block := file.read(_CHUNK):
                digest.update(block)
        else:
            for offset, length in _samples(path, size):
                digest.update(os.pread(file.fileno(), length, offset))
    return digest.hexdigest()


def _samples(path: Path, size: int) -> list[tuple[int, int]]:
    """Return offset and length of each sample of a large file, the last one at its end."""
    last = size - _BLOCK_BYTES
    blocks = [(i * last // (_NUM_BLOCKS - 1), _BLOCK_BYTES) for i in range(_NUM_BLOCKS)]
    try:
        entries, header = read_header(path)
    except CheckpointError:  # loading reports it
        return blocks
    smallest = sorted(entries.values(), key=lambda entry: (entry.num_bytes, entry.offset))
    middles = [
        (entry.offset + max(0, entry.num_bytes - _TENSOR_BYTES) // 2, _TENSOR_BYTES)
        for entry in smallest[:_NUM_TENSORS]
    ]
    return sorted({(0, min(header, _HEADER_BYTES)), *blocks, *middles})
