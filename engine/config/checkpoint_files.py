"""Checkpoint files: why one cannot be used, in one sentence that names it and says what to do.

Used by everything that opens a file of a checkpoint: preflight, config.json, tokenizer, weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "download or copy it again"
_MAX_TEXT = 200
_SHOWN = 3
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_FORMATS = {"*.gguf": "GGUF", "*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX"}


def is_there(path: Path) -> bool:
    """Return whether a file's name exists, be it a link to nothing."""
    return os.path.lexists(path)  # Path.exists raises in a folder that may not be read


def why_unreadable(path: Path) -> str:
    """Return why a file cannot be read, to follow its name; "" where it can."""
    if os.path.islink(path) and not os.path.exists(path):
        return (
            f"is a link to {os.readlink(path)}, which does not exist (in a Hugging Face cache: the "
            "blob is missing, or was not copied along); download it again, or copy the folder "
            "with `cp -rL`"
        )
    if os.path.isdir(path):
        return "is a folder and must be a file; " + _AGAIN
    if os.path.exists(path) and not os.path.isfile(path):
        return "is no regular file; " + _AGAIN
    try:
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return "does not exist; download it"
    except PermissionError:
        return "cannot be read: Permission denied; make it readable for this user"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}; {_AGAIN}"
    return ""


def read_text(path: Path, *, may_be_empty: bool = False) -> str:
    """Return the text of a file. Raises ValueError, which names the file and the reason."""
    if why := why_unreadable(path):
        raise ValueError(f"{path} {why}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; {_AGAIN}") from error
    if not data.strip() and not may_be_empty:
        raise ValueError(f"{path} is empty; {_AGAIN}")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer: run `git lfs pull` in its folder")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); save it as "
            f"UTF-8, or {_AGAIN}"
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ValueError, which names the file and the reason."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:_MAX_TEXT]
        cut = ", as if cut off" if getattr(error, "pos", 0) >= len(text.rstrip()) else ""
        raise ValueError(f"{path} is not valid JSON ({why}){cut}; {_AGAIN}") from error
    if not isinstance(value, dict):
        kinds = {list: "a list", str: "text", type(None): "null"}
        found = kinds.get(type(value), repr(value))
        raise ValueError(f"{path} must hold one JSON object, and holds {found}; {_AGAIN}")
    return value


def describe_missing_weights(folder: Path) -> str:
    """Return what a folder without `model.safetensors` and its index holds instead, and what to do.

    Completes the sentence "DIR ...".
    """
    tensors = _names(folder, "*.safetensors")
    pickles = [name for pattern in _PICKLES for name in _names(folder, pattern)]
    pickles = [name for name in pickles if name != "training_args.bin"]
    nothing = f"holds neither {SINGLE} nor {INDEX}"
    if adapters := _starting(tensors + pickles, "adapter_"):
        others = set(tensors + pickles) - set(adapters)
        if not others:
            return (
                f"holds an adapter ({_list(adapters)}) and not the model that it belongs to: merge "
                "the two (peft: merge_and_unload(), then save_pretrained(new_folder)) and name "
                "that folder"
            )
    if own := _starting(tensors + pickles, "consolidated"):
        return (
            f"{nothing}, though {_list(own)}: weights in the format of their authors' own code, "
            "with other tensor names; download the files model*.safetensors of the Hugging Face "
            "checkpoint, or convert these with transformers' convert_*_weights_to_hf.py"
        )
    if shards := [name for name in tensors if "-of-" in name and name.startswith("model-")]:
        return f"holds {_list(shards)} and no {INDEX}; download it, it names the tensors' files"
    if variants := [name for name in tensors if name.startswith("model.")]:
        new = f"{SINGLE} (and shards and index alike)" if len(variants) > 1 else SINGLE
        return (
            f"{nothing}, though the variant {_list(variants)}: rename it to {new}, or make a link "
            "of that name"
        )
    if tensors:
        return (
            f"{nothing}, though {_list(tensors)} is there: add an index, or rename it to {SINGLE} "
            "if it holds the whole model"
        )
    if pickles:
        return (
            f"holds only pickled weights ({_list(pickles)}), which can run code when loaded and "
            "are refused. Convert them if you trust their origin: "
            "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(new_folder)"
        )
    for pattern, kind in _OTHER_FORMATS.items():
        if names := _names(folder, pattern):
            return (
                f"holds {kind} weights ({_list(names)}), which are not read; download the "
                "checkpoint's safetensors files"
            )
    return (
        f"{nothing}; point model.path at a Hugging Face checkpoint, or pass "
        "--set model.load_format=dummy to run on random weights"
    )


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def _starting(names: Iterable[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
