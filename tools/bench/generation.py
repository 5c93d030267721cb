"""Candidates of bench_generate.py and their settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.candidate import Candidate

REFERENCE = "transformers-eager"  # whose greedy tokens are right by definition
PEERS = ("vllm", "transformers", "llama.cpp")
PLUG_IN = "lockstep"  # this engine's expert parallelism inside transformers
# The same with token_drop, each rank's rows held to its mean share.
CAPACITY = {
    "policy": "token_drop",
    "scope": "rank",
    "factor": "1.0",
    "phases": ["prefill", "decode"],
}
BY_TRANSFORMERS = "model.implementation=transformers"
COMPARED = "lockstep-1-rank"  # --against also runs that of the other commit


def generation_candidates(
    peers: Mapping[str, str],
    threads: int,
    settings: Sequence[str],
    transformers_batch: int | None,
    peer_dtype: str = "float32",
) -> list[Candidate]:
    """Return all candidates that can run here, in the order of the table.

    Args:
        peers: interpreters of `PEERS`; of transformers by default this one.
        threads: CPU threads per candidate, shared by its ranks.
        settings: config keys for this engine.
        transformers_batch: see `workers/generate_transformers.py`.
        peer_dtype: of vLLM and transformers.
    """
    python = peers.get("transformers", sys.executable)
    half = max(1, threads // 2)
    batch: dict[str, Any] = {"batch": transformers_batch, "dtype": peer_dtype}
    found = [
        _lockstep(COMPARED, 1, threads, settings),
        _lockstep("lockstep-2-ranks", 2, half, settings),
        _lockstep("lockstep-1-rank-by-transformers", 1, threads, [*settings, BY_TRANSFORMERS]),
        _lockstep("lockstep-2-ranks-by-transformers", 2, half, [*settings, BY_TRANSFORMERS]),
        _transformers(REFERENCE, python, threads, experts="eager", **batch),
        _transformers("transformers-grouped_mm", python, threads, experts="grouped_mm", **batch),
    ]
    if _has_package(python, "accelerate"):  # transformers refuses to distribute a model without it
        split: dict[str, Any] = {"ranks": 2, "experts": "grouped_mm", **batch}
        for how in ("all_to_all", "all_reduce", PLUG_IN):
            name = f"transformers-2-ranks-{how}"
            found.append(_transformers(name, python, half, expert_parallel=how, **split))
        name = f"transformers-2-ranks-{PLUG_IN}-token_drop"
        load = {**split, "expert_parallel": PLUG_IN, "capacity": CAPACITY}
        found.append(_transformers(name, python, half, **load))
    if "vllm" in peers:
        found.append(_vllm(peers["vllm"], threads, peer_dtype))
    if "llama.cpp" in peers:
        found += [_llama_cpp(peers["llama.cpp"], threads, each) for each in ("q8_0", "q4_0")]
    return found


def of_commit(candidate: Candidate, name: str, root: Path) -> Candidate:
    """Return the same candidate with the tools and the engine of another checkout.

    Args:
        name: of the commit, as the table shows it.
        root: folder of the checkout.
    """
    return replace(candidate, name=f"{candidate.name}@{name}", root=root)


def with_settings(candidate: Candidate, more: Sequence[str]) -> Candidate:
    """Return the same candidate of this engine with further config keys, named after them."""
    load = {**candidate.load, "settings": [*candidate.load["settings"], *more]}
    return replace(candidate, name=f"{candidate.name} {' '.join(more)}", load=load)


def _lockstep(name: str, ranks: int, threads: int, settings: Sequence[str]) -> Candidate:
    return Candidate(
        name=name,
        module="bench.workers.generate_lockstep",
        python=sys.executable,
        ranks=ranks,
        threads=threads,
        # Room for every sequence of the largest job; by default the cache would take what is free.
        # As many sequences at once as vLLM runs by default.
        load={
            "settings": [
                "scheduler.kv_cache_gib=0.5",
                "scheduler.max_sequences=256",
                *settings,
            ]
        },
        needs_engine=True,
    )


def _transformers(
    name: str, python: str, threads: int, *, ranks: int = 1, **load: Any
) -> Candidate:
    return Candidate(
        name=name,
        module="bench.workers.generate_transformers",
        python=python,
        ranks=ranks,
        threads=threads,
        load=load,
        needs_engine=load.get("expert_parallel") == PLUG_IN,
    )


def _vllm(python: str, threads: int, dtype: str) -> Candidate:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return Candidate(
        name="vllm",
        module="bench.workers.generate_vllm",
        python=python,
        threads=threads,
        load={"dtype": dtype},
        env={
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )


def _llama_cpp(python: str, threads: int, kind: str) -> Candidate:
    return Candidate(
        name=f"llama.cpp-{kind}",
        module="bench.workers.generate_llama_cpp",
        python=python,
        threads=threads,
        load={"kind": kind},
    )


def _has_package(python: str, package: str) -> bool:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0
