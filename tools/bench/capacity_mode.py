"""What bench_moe_layer.py does with --capacity: one layer, skewed loads, every policy in turns.

    layer ms       median over rounds of the slower rank's forward
    speedup        dropless ms / this row's, in the same run
    bound S        rows of the most loaded rank, dropless over this row: no policy can do better
    of bound       speedup / S
    adds           what the policy costs before a row moves (deciding, sorting, accounting) beyond
                   the count exchange that dropless needs too, timed alone; % of this row's layer

Two real ranks are pinned to a core each. With --virtual the ranks are worked out one at a time, see
`virtual.py`.

Legend: E experts, W ranks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.contender import Contender, Running, start
from bench.loads import (
    cap_loads,
    fit,
    hot_loads,
    rank_loads,
    recorded_loads,
    routing_of,
    zipf_loads,
)
from bench.moe_case import MoEShape
from bench.report import spread, table
from bench.virtual import LayerTime, Transfers, VirtualLayer

HEADER = ["policy", "layer ms", "speedup", "bound S", "of bound", "dropped", "adds ms", "adds"]
VIRTUAL_HEADER = ["policy", "layer ms", "slowest rank ms", "all-to-alls ms", "speedup", "bound S"]
DROPLESS = "none"
TRANSFER_BYTES = (0, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)


def policies(shape: MoEShape, gammas: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of a table: name -> settings of moe.capacity."""
    found: dict[str, dict[str, Any]] = {DROPLESS: {"policy": "none"}}
    for gamma in gammas:
        for scope in ("expert", "rank"):
            for policy in ("token_drop", "expanded_drop"):
                found[f"{policy} {scope} {gamma}"] = {
                    "policy": policy,
                    "factor": gamma,
                    "scope": scope,
                }
    last = gammas[-1]
    base = {"policy": "token_drop", "factor": last}
    for consensus in ("quota", "local"):
        found[f"token_drop expert {last} {consensus}"] = base | {"consensus": consensus}
    found[f"token_drop expert {last} radix"] = base | {"selection": "radix"}
    slack = f"{shape.experts / shape.top_k:g}"
    found[f"token_drop expert {slack} (E/K)"] = {"policy": "token_drop", "factor": slack}
    return found


def make_loads(
    name: str, shape: MoEShape, tokens: int, num_ranks: int, recorded: Path | None
) -> dict[str, np.ndarray]:
    """Loads of all experts over `tokens` tokens by name: zipfS, hotR, uniform or recorded.

    recorded gives one entry a layer of the file.

    Raises:
        ValueError: an unknown name, or one that does not fit the shape.
    """
    kind = name.rstrip("0123456789.")
    number = name[len(kind) :]
    if kind == "uniform":
        return {name: zipf_loads(tokens, shape.experts, shape.top_k, 0.0)}
    if kind == "zipf" and number:
        return {name: zipf_loads(tokens, shape.experts, shape.top_k, float(number))}
    if kind == "hot" and number:
        return {name: hot_loads(tokens, shape.experts, shape.top_k, float(number), num_ranks)}
    if name == "recorded":
        if recorded is None:
            raise ValueError("--loads recorded needs --recorded report.json of a batch job")
        layers = recorded_loads(recorded)
        wrong = next((layer for layer in layers.values() if len(layer) != shape.experts), None)
        if wrong is not None:
            raise ValueError(
                f"--recorded {recorded}: has {len(wrong)} experts, the bench {shape.experts}; "
                f"pass --experts {len(wrong)} and the model's --top-k"
            )
        return {
            f"recorded layer {layer}": fit(loads, tokens, shape.top_k)
            for layer, loads in layers.items()
        }
    raise ValueError(
        f"--loads {name}: must be uniform, zipfS, hotR (as zipf0.5, hot1.6) or recorded"
    )


def start_ranks(shape: dict[str, int], seed: int, python: str) -> Contender:
    """Two real ranks with a core each."""
    return Contender(
        name="lockstep-2-ranks",
        module="bench.workers.moe_capacity",
        python=python,
        ranks=2,
        threads=1,
        load={"shape": shape, "seed": seed},
        needs_engine=True,
    )


def real_case(
    running: Running, shape: MoEShape, loads_E: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Run every policy on two ranks; return each one's figures."""
    rows = policies(shape, options.gammas)
    arguments = {
        "loads": loads_E.tolist(),
        "tokens": options.tokens[0],
        "policies": rows,
        "rounds": options.rounds,
    }
    replies = running.call("compare", **arguments)
    alone = running.call("agree", **arguments)
    figures: dict[str, Any] = {}
    for name in rows:
        entries = [reply[name] for reply in replies]
        seconds = [max(pair) for pair in zip(*(entry["seconds"] for entry in entries), strict=True)]
        agree = [max(pair) for pair in zip(*(reply[name] for reply in alone), strict=True)]
        figures[name] = {
            "seconds": spread(seconds),
            "agree_seconds": spread(agree),
            "rows": [entry["rows"] for entry in entries],
            "phases": [entry["phases"] for entry in entries],
            "bytes": [entry["bytes"] for entry in entries],
            "collectives": entries[0]["collectives"],
            "digest": [entry["digest"] for entry in entries],
        }
    base = figures[DROPLESS]
    total = sum(base["rows"])
    for entry in figures.values():
        # Rounds run in turns, so a round's policies share its state of the machine.
        pairs = zip(base["seconds"]["all"], entry["seconds"]["all"], strict=True)
        entry["speedup"] = statistics.median(one / other for one, other in pairs)
        entry["bound"] = max(base["rows"]) / max(entry["rows"])
        entry["of_bound"] = entry["speedup"] / entry["bound"]
        entry["dropped"] = 1 - sum(entry["rows"]) / total  # of all rows; extras count against it
        entry["adds"] = entry["agree_seconds"]["median"] - base["agree_seconds"]["median"]
        entry["adds_share"] = entry["adds"] / entry["seconds"]["median"]
        entry["equal_to_dropless"] = entry["digest"] == base["digest"]
    return figures


def real_table(name: str, loads_E: np.ndarray, tokens: int, figures: dict[str, Any]) -> str:
    """One case's table."""
    ranks = rank_loads(loads_E, 2)
    rows = [
        [
            policy,
            entry["seconds"]["median"] * 1e3,
            entry["speedup"],
            entry["bound"],
            f"{entry['of_bound']:.1%}",
            f"{entry['dropped']:.1%}",
            entry["adds"] * 1e3,
            f"{entry['adds_share']:.1%}",
        ]
        for policy, entry in figures.items()
    ]
    equal = [policy for policy, entry in figures.items() if entry["equal_to_dropless"]]
    return (
        f"{name}: {tokens:,} tokens a rank on 2 real ranks, max/mean rows: experts "
        f"{loads_E.max() / loads_E.mean():.2f}, ranks {ranks.max() / ranks.mean():.2f}\n"
        f"{table(HEADER, rows)}\nbitwise equal outputs: {', '.join(equal)}"
    )


def measure_transfers(running: Running, rounds: int = 9) -> Transfers:
    """Seconds of an all-to-all between two real ranks by bytes."""
    replies = running.call("exchange", num_bytes=list(TRANSFER_BYTES), rounds=rounds)
    slower = zip(*(reply["seconds"] for reply in replies), strict=True)
    return Transfers(TRANSFER_BYTES, tuple(max(pair) for pair in slower))


def virtual_case(
    layer: VirtualLayer,
    loads_E: np.ndarray,
    tokens: int,
    gammas: Sequence[str],
    transfers: Transfers,
    rounds: int,
) -> dict[str, Any]:
    """Time Token Drop on virtual ranks; expert and rank scope at every gamma, in turns."""
    num_ranks, shape = layer.num_ranks, layer.shape
    ids_TK = routing_of(loads_E, tokens * num_ranks).numpy()
    parts = np.split(ids_TK, num_ranks)
    counts_WE = np.stack(
        [np.bincount(part.ravel(), minlength=shape.experts) for part in parts]
    ).astype(np.int64)
    cases = {DROPLESS: counts_WE}
    for gamma in gammas:
        kept_E = cap_loads(loads_E, gamma, tokens * num_ranks, shape.top_k)
        cases[f"token_drop expert {gamma}"] = _scale(counts_WE, kept_E)
        cases[f"token_drop rank {gamma}"] = _scale(counts_WE, _pool(loads_E, gamma, num_ranks))
    times = layer.compare(list(cases.values()), transfers, rounds)
    figures: dict[str, Any] = {}
    for (name, kept_WE), time in zip(cases.items(), times, strict=True):
        figures[name] = _virtual_entry(kept_WE, time, counts_WE, times[0], num_ranks)
    return figures


def virtual_table(name: str, tokens: int, num_ranks: int, figures: dict[str, Any]) -> str:
    """One case's table, labelled."""
    rows = [
        [
            policy,
            entry["seconds"] * 1e3,
            entry["slowest_seconds"] * 1e3,
            entry["collective_seconds"] * 1e3,
            entry["speedup"],
            entry["bound"],
        ]
        for policy, entry in figures.items()
    ]
    return (
        f"{name}: VIRTUAL, {num_ranks} ranks of {tokens:,} tokens worked out one at a time on the "
        f"whole machine, all-to-alls as measured between 2 ranks\n{table(VIRTUAL_HEADER, rows)}"
    )


def _virtual_entry(
    kept_WE: np.ndarray, time: LayerTime, before_WE: np.ndarray, base: LayerTime, num_ranks: int
) -> dict[str, Any]:
    before = rank_loads(before_WE.sum(0), num_ranks).max()
    return {
        "seconds": time.seconds,
        "slowest_seconds": max(time.rank_seconds),
        "collective_seconds": time.collective_seconds,
        "speedup": base.seconds / time.seconds,
        "bound": float(before / rank_loads(kept_WE.sum(0), num_ranks).max()),
        "virtual": True,
    }


def _pool(loads_E: np.ndarray, gamma: str, num_ranks: int) -> np.ndarray:
    """Loads under rank scope, the cut shared by a rank's experts in proportion."""
    kept = loads_E.astype(np.float64)
    mean = float(gamma) * loads_E.sum() / len(loads_E)
    for part in np.array_split(np.arange(len(loads_E)), num_ranks):
        rows, limit = loads_E[part].sum(), len(part) * mean
        if rows > limit:
            kept[part] *= limit / rows
    return np.floor(kept).astype(np.int64)


def _scale(counts_WE: np.ndarray, kept_E: np.ndarray) -> np.ndarray:
    """Cut each expert's rows to `kept_E`, each rank in proportion."""
    total_E = np.maximum(counts_WE.sum(0), 1)
    scaled = counts_WE * (kept_E / total_E)
    whole = np.floor(scaled).astype(np.int64)
    for expert, missing in enumerate(kept_E - whole.sum(0)):
        order = np.argsort(whole[:, expert] - scaled[:, expert], kind="stable")
        whole[order[: int(missing)], expert] += 1
    return whole


def run(options: argparse.Namespace, shape: MoEShape, python: str) -> tuple[str, dict[str, Any]]:
    """Run all loads; return the tables and the JSON record."""
    fields = {
        "hidden": shape.hidden,
        "ffn": shape.ffn,
        "experts": shape.experts,
        "top_k": shape.top_k,
    }
    tokens, num_ranks = options.tokens[0], options.ranks if options.virtual else 2
    cases: dict[str, np.ndarray] = {}
    for name in options.loads:
        cases |= make_loads(name, shape, tokens * num_ranks, num_ranks, options.recorded)
    texts, record = [], {}
    with start(start_ranks(fields, options.seed, python)) as running:
        running.call("load", shape=fields, seed=options.seed, threads=1)
        if options.virtual:
            transfers = measure_transfers(running)
            layer = VirtualLayer(shape, num_ranks, options.seed)
            for name, loads_E in cases.items():
                figures = virtual_case(
                    layer, loads_E, tokens, options.gammas, transfers, options.rounds
                )
                record[name] = {"loads": loads_E.tolist(), "policies": figures}
                texts.append(virtual_table(name, tokens, num_ranks, figures))
            record["transfers"] = dict(
                zip(map(str, transfers.num_bytes), transfers.seconds, strict=True)
            )
        else:
            for name, loads_E in cases.items():
                figures = real_case(running, shape, loads_E, options)
                record[name] = {"loads": loads_E.tolist(), "policies": figures}
                texts.append(real_table(name, loads_E, tokens, figures))
    return "\n\n".join(texts), record
