"""Identity of a job: what its manifest says of it, and in words how two manifests differ.

A job is its input's content, the settings that change results and the files of the checkpoint
(`weights/fingerprint.py`); the number of ranks, the device and the like may change between runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from engine.batch.input.index import InputIndex
from engine.batch.records.job_format import format_of
from engine.config import (
    CONTIGUOUS,
    Config,
    DispatchConfig,
    MoEConfig,
    SamplingConfig,
)
from engine.config.moe import SUMMING
from engine.config.validation import type_hints
from engine.distributed.health.progress import OnProgress, ignore_progress
from engine.moe.placement.placement_file import digest, read_placement
from engine.moe.policy.policy_file import digest as policy_digest
from engine.moe.policy.policy_file import placement_path, read_policy
from engine.weights.fingerprint import changed_files, fingerprint

VERSION = 1

# Where these differ, so do the files, and there is no need to list them.
_MODEL = ("model.path", "model.tokenizer", "model.load_format")

# Of `sampling`, what every manifest has.
_FIRST_SAMPLING = frozenset(
    """
    ignore_eos logprobs max_new_tokens prompt_logprobs seed stop stop_token_ids temperature top_k
    top_p
    """.split()
)


def make_manifest(
    index: InputIndex, config: Config, report: OnProgress = ignore_progress
) -> dict[str, Any]:
    """Return the manifest of a job, JSON-ready: its input and what else makes its results.

    Reads samples of the checkpoint's files.

    Args:
        index: of the input.
        config: of the run.
        report: called once per file of the checkpoint.
    """
    settings = result_settings(config)
    canonical = json.dumps(settings, sort_keys=True).encode()
    policy = {}
    if config.moe.policy is not None:  # where it was: its hash is among the settings
        policy = {"policy": {"path": config.moe.policy, "digest": settings["moe.policy"]}}
    return {
        "version": VERSION,
        "input": {
            "path": str(index.path),
            "size": index.size,
            "sha256": index.sha256,
            "requests": len(index),
        },
        "settings": settings,
        "settings_sha256": hashlib.sha256(canonical).hexdigest(),
        "files": fingerprint(config.model, report),
        **policy,
    }


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that change results, by dotted name; JSON-ready.

    moe.policy is there by its hash, and moe.capacity is left out then.
    Those of moe.dispatch, moe.shared_expert, model.quantization, model.implementation, the
    placement and later ones of sampling are left out where they have their defaults, so that older
    ledgers still resume.
    moe.overlap.by = tokens is left out, though it may change results by rounding where the GEMM
    library picks its kernel by the number of rows.
    """
    tree: dict[str, Any] = {
        "model": asdict(config.model),
        "moe": {"capacity": asdict(config.moe.capacity)},
        "sampling": {
            key: value
            for key, value in asdict(config.sampling).items()
            if key in _FIRST_SAMPLING or value != getattr(SamplingConfig(), key)
        },
    }
    for key in ("quantization", "implementation"):
        if tree["model"][key] == "auto":
            del tree["model"][key]
    for key in ("path", "tokenizer"):
        if tree["model"][key] is not None:
            tree["model"][key] = str(Path(tree["model"][key]).resolve())
    if config.model.load_format == "dummy":
        tree["runtime"] = {"seed": config.runtime.seed}
    dispatch, default = config.moe.dispatch, DispatchConfig()
    tree["moe"]["dispatch"] = {
        key: getattr(dispatch, key)
        for key in ("dtype", "partial_sums")  # deduplicate changes no bit
        if getattr(dispatch, key) != getattr(default, key)
    }
    if dispatch.transport in SUMMING:  # the others change no bit
        tree["moe"]["dispatch"]["transport"] = dispatch.transport
    if config.moe.shared_expert != MoEConfig().shared_expert:
        tree["moe"]["shared_expert"] = config.moe.shared_expert
    placement = config.moe.placement
    if config.moe.policy is not None:  # takes the place of these two
        del tree["moe"]["capacity"]
        policy = read_policy(config.moe.policy)
        tree["moe"]["policy"] = policy_digest(policy)
        placement = placement_path(policy, config.moe.policy) or CONTIGUOUS
    if placement != CONTIGUOUS:
        # What it says, not where it is: a copy of the file elsewhere is the same placement.
        tree["moe"]["placement"] = digest(read_placement(placement))
        copies = asdict(config.moe.copies)
        tree["moe"]["copies"] = {key: copies[key] for key in ("phases", "target", "min_rows")}
    return json.loads(json.dumps(_flat(tree)))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a sentence for each difference between two manifests; empty for the same job.

    Files are compared where both manifests have them: older versions recorded none.
    """
    if old.get("version") != new["version"]:
        return [f"its format is version {old.get('version')}, this program writes {new['version']}"]
    found = []
    before, now = old["input"], new["input"]
    if (before["size"], before["sha256"]) != (now["size"], now["sha256"]):
        found.append(
            f"the input was {before['path']}, {before['size']} bytes, sha256 "
            f"{before['sha256'][:12]}, is {now['path']}, {now['size']} bytes, sha256 "
            f"{now['sha256'][:12]}"
        )
    if format_of(old) != format_of(new):
        found.append(f"batch.format was {format_of(old)}, is {format_of(new)}")
    was, is_ = old["settings"], new["settings"]
    # A manifest with a policy has no moe.capacity, whose place it takes.
    other_way = ("moe.policy" in was) != ("moe.policy" in is_)
    for key in sorted(was.keys() | is_.keys()):
        if other_way and key.startswith("moe.capacity."):
            continue
        if was.get(key) != is_.get(key):
            before, now = (json.dumps(_value(each, key)) for each in (was, is_))
            found.append(f"{key} was {before}, is {now}")
    if has_files(old) and has_files(new) and all(was.get(key) == is_.get(key) for key in _MODEL):
        found += changed_files(old["files"], new["files"], is_)
    return found


def _value(settings: dict[str, Any], key: str) -> Any:
    """Return a setting of a manifest, which leaves some out that have their defaults."""
    if key in settings:
        return settings[key]
    section: Any = Config
    default: Any = None
    for name in key.split("."):
        known = {item.name: item.default for item in fields(section)}
        if name not in known:
            return None  # of another version
        default, hint = known[name], type_hints(section)[name]
        if is_dataclass(hint):
            section = hint
    return None if default is MISSING else default


def has_files(manifest: dict[str, Any]) -> bool:
    """Return whether a manifest has the files of the checkpoint: older versions recorded none."""
    return isinstance(manifest.get("files"), dict)
