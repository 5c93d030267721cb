"""Preflight: whether this machine can run a config, checked before any communication.

Uses the file system and the visible devices alone, so a missing checkpoint or GPU takes a second
and gives a plain message instead of a stack trace from each of eight ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.config import CONTIGUOUS, Config
from engine.config.checkpoint_files import (
    INDEX,
    SINGLE,
    describe_missing_weights,
    is_there,
    why_unreadable,
)
from engine.config.host_devices import gpu_problem
from engine.config.loader import PROJECT_ROOT
from engine.config.validation import ConfigError

_INFER = "launch/infer.py" if (PROJECT_ROOT / "launch").is_dir() else "-m lockstep infer"
TINY_COMMAND = f"torchrun --nproc-per-node 2 {_INFER} --config tiny_mixtral_ep2.yaml"
_BUNDLED = "configs/checkpoints"
_CLOSED = "the folder cannot be read: Permission denied; make it readable for this user (chmod +rx)"
# Names of the number of experts in the model families' config.json.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# More threads than this per core may not start at all: a container limits their number.
_THREADS_PER_CORE = 16


def check_runnable(config: Config, environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` unless the checkpoint is on disk and this host has the devices.

    The error names everything that is missing and a command that runs without it. No communication.

    Args:
        config: what to run.
        environ: the launcher's environment, with the number of ranks on this host.
    """
    problems = [*_checkpoint_problems(config), *_device_problems(config, environ)]
    placement, policy = config.moe.placement, config.moe.policy
    if policy is not None and not os.path.isfile(policy):
        problems.append(
            f"moe.policy = {policy!r}: no such file{_literal(policy)}; name a policy file "
            "(docs/policy.md), or pass --set moe.policy=null"
        )
    elif policy is None and placement != CONTIGUOUS and not os.path.isfile(placement):
        problems.append(
            f"moe.placement = {placement!r}: no such file{_literal(placement)}; name one that "
            "tools/plan_placement.py has written, or pass --set moe.placement=contiguous"
        )
    cores = os.cpu_count() or 1
    if (threads := config.runtime.threads) is not None and threads > _THREADS_PER_CORE * cores:
        problems.append(
            f"runtime.threads = {threads}: this host has {cores} CPU cores, and more than "
            f"{_THREADS_PER_CORE} threads per core cannot be meant; pass --set "
            "runtime.threads=null for this rank's share of the cores"
        )
    if not problems:
        return
    lines = ["this config cannot run here:", *(f"  - {problem}" for problem in problems)]
    if _BUNDLED not in Path(config.model.path).as_posix():
        lines.append(f"The bundled model runs on any machine: {TINY_COMMAND}")
    raise ConfigError("\n".join(lines))


def read_num_experts(folder: Path) -> int:
    """Return the number of experts per layer from config.json. Raises `ConfigError`."""
    where = f"model.path = {str(folder)!r}"
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it must hold one JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot read config.json: {error}") from None
    found = {name: values[name] for name in _NUM_EXPERTS if name in values}
    if not found:
        raise ConfigError(
            f"{where}: config.json has no number of experts "
            f"({', '.join(_NUM_EXPERTS)}), which parallel.expert = auto needs; give a number"
        )
    # Some models' files keep the names of others, with null or 0 in them.
    usable = [value for value in found.values() if type(value) is int and value > 0]
    if not usable:
        name, value = next(iter(found.items()))
        raise ConfigError(
            f"{where}: {name} = {value!r} in config.json: must be a whole number from 1, which "
            "parallel.expert = auto needs; compare it with the published config.json"
        )
    return usable[0]


def _checkpoint_problems(config: Config) -> Iterator[str]:
    model, folder = config.model, Path(config.model.path)
    if not os.path.isdir(folder):  # Path.is_dir raises where a folder may not be read
        if folder.parts[:2] == Path(_BUNDLED).parts:
            remedy = "it is part of the repository: restore it with `git checkout -- configs`"
        else:
            remedy = (
                "put the Hugging Face checkpoint there (config.json, *.safetensors and the "
                "tokenizer), or name its folder with --set model.path=DIR"
            )
        yield f"model.path = {model.path!r}: no such directory{_literal(model.path)}; {remedy}"
    elif not os.access(folder, os.R_OK | os.X_OK):
        yield f"model.path = {model.path!r}: {_CLOSED}"
    elif is_there(folder / "config.json") and (why := why_unreadable(folder / "config.json")):
        yield f"model.path = {model.path!r}: config.json {why}"
    elif not os.path.isfile(folder / "config.json"):
        yield (
            f"model.path = {model.path!r}: holds no config.json, so it is no checkpoint; name the "
            "folder that has it, or download the checkpoint again"
        )
    elif model.load_format == "safetensors":
        found = next((name for name in (SINGLE, INDEX) if is_there(folder / name)), None)
        if found is None:
            yield f"model.path = {model.path!r}: {describe_missing_weights(folder)}"
        elif why := why_unreadable(folder / found):
            yield f"model.path = {model.path!r}: {found} {why}"
    if model.tokenizer is not None and not os.path.isdir(model.tokenizer):
        yield (
            f"model.tokenizer = {model.tokenizer!r}: no such directory{_literal(model.tokenizer)}; "
            "name a Hugging Face tokenizer's, or pass --set model.tokenizer=null to use the one in "
            "model.path"
        )
    elif model.tokenizer is not None and not os.access(model.tokenizer, os.R_OK | os.X_OK):
        yield f"model.tokenizer = {model.tokenizer!r}: {_CLOSED}"


def _literal(path: str) -> str:
    """Return what to add where a path that is missing has an environment variable in it."""
    return " (environment variables are not expanded)" if "$" in path else ""


def _device_problems(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    if config.runtime.device != "cuda":
        return
    if problem := gpu_problem(environ):
        yield f"runtime.device = 'cuda': {problem}, or pass --set runtime.device=cpu"
