"""bench_moe_layer.py --capacity: one layer, skewed loads, every policy in turns.

    layer ms       median over rounds of the slower rank's forward
    speedup        dropless ms / this row's, in the same round; median over rounds
    bound S        rows of the most loaded rank, dropless over this row: the most that a policy can
                   gain by the experts' work alone
    of bound       speedup / S
    rows           of all ranks' experts, against dropless: what is dropped, less what is added
    adds           the cost of the policy before dispatch (claims, consensus, selection, sorting,
                   accounting) beyond the sorting and count exchange that dropless also needs, timed
                   alone, without the gate; % of this row's layer

The second table has the ms of each phase of the layer, from its own clock, of the rank that takes
longer in it; in consensus, dispatch and combine that rank may be waiting. Below are the costs of
the ways to agree, and of a capacity that cannot bind.

Two real ranks are pinned to a core each. With --simulated, ranks run one at a time: see
`simulated_mode.py`.

Legend: E experts, W ranks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.candidate import Candidate, Running
from bench.loads import fit, overloaded_rank_loads, rank_loads, recorded_loads, zipf_loads
from bench.moe_case import MoEShape
from bench.report import spread, table
from engine.profiling.phase_clock import Phase

HEADER = ["policy", "layer ms", "speedup", "bound S", "of bound", "rows", "adds ms", "adds"]
PHASES = (
    Phase.GATE, Phase.PLAN, Phase.CONSENSUS, Phase.DISPATCH, Phase.EXPERTS, Phase.COMBINE
)  # fmt: skip
DROPLESS = "none"


def policies(shape: MoEShape, gammas: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the rows of a table: name -> settings of moe.capacity."""
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
        for scope in ("expert", "rank"):
            settings = base | {"scope": scope, "consensus": consensus}
            found[f"token_drop {scope} {last} {consensus}"] = settings
    found[f"token_drop expert {last} radix"] = base | {"selection": "radix"}
    found[slack_name(shape)] = {"policy": "token_drop", "factor": _slack(shape)}
    return found


def slack_name(shape: MoEShape) -> str:
    """Return the name of the row whose capacity cannot bind."""
    return f"token_drop expert {_slack(shape)} (>= E/K)"


def _slack(shape: MoEShape) -> str:
    """Return the smallest whole gamma that is at least E/K."""
    return str(-(-shape.experts // shape.top_k))


def make_loads(
    name: str, shape: MoEShape, tokens: int, num_ranks: int, recorded: Path | None
) -> dict[str, np.ndarray]:
    """Return loads of all experts over `tokens` tokens by name: zipfS, hotR, uniform or recorded.

    recorded: one entry per layer of the file.

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
        return {
            name: overloaded_rank_loads(
                tokens, shape.experts, shape.top_k, float(number), num_ranks
            )
        }
    if name == "recorded":
        if recorded is None:
            raise ValueError(
                "--loads recorded needs --recorded FILE, a batch job's report.json or an .npz"
            )
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


def start_ranks(shape: dict[str, int], seed: int, python: str) -> Candidate:
    """Return the candidate of two real ranks with a core each."""
    return Candidate(
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
    """Run every policy on two ranks; return the figures of each."""
    rows = policies(shape, options.gammas)
    arguments = {
        "loads": loads_E.tolist(),
        "tokens": options.tokens[0],
        "policies": rows,
        "rounds": options.rounds,
    }
    replies = running.call("compare", **arguments)
    agreement = running.call("agree", **arguments)
    figures: dict[str, Any] = {}
    for name in rows:
        entries = [reply[name] for reply in replies]
        seconds = [max(pair) for pair in zip(*(entry["seconds"] for entry in entries), strict=True)]
        agree = [max(pair) for pair in zip(*(reply[name] for reply in agreement), strict=True)]
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
        entry["dropped"] = 1 - sum(entry["rows"]) / total  # less what was added
        entry["adds"] = entry["agree_seconds"]["median"] - base["agree_seconds"]["median"]
        entry["adds_share"] = entry["adds"] / entry["seconds"]["median"]
        entry["equal_to_dropless"] = entry["digest"] == base["digest"]
    return figures


def real_text(
    name: str, loads_E: np.ndarray, tokens: int, shape: MoEShape, figures: dict[str, Any]
) -> str:
    """Return one case's tables and the lines below them."""
    ranks = rank_loads(loads_E, 2)
    rows = [
        [
            policy,
            entry["seconds"]["median"] * 1e3,
            entry["speedup"],
            entry["bound"],
            f"{entry['of_bound']:.1%}",
            f"{0 - entry['dropped']:+.1%}",
            entry["adds"] * 1e3,
            f"{entry['adds_share']:.1%}",
        ]
        for policy, entry in figures.items()
    ]
    phases = [
        [policy, *(max(rank[phase] for rank in entry["phases"]) * 1e3 for phase in PHASES)]
        for policy, entry in figures.items()
    ]
    names = ["policy", *(f"{phase.name.lower()} ms" for phase in PHASES)]
    return (
        f"{name}: {tokens:,} tokens per rank on 2 real ranks, max/mean rows: experts "
        f"{loads_E.max() / loads_E.mean():.2f}, ranks {ranks.max() / ranks.mean():.2f}\n"
        f"{table(HEADER, rows)}\n\n{table(names, phases)}\n\n" + "\n".join(_notes(shape, figures))
    )


def _notes(shape: MoEShape, figures: dict[str, Any]) -> list[str]:
    """Return the lines that compare rows."""
    notes = []
    for quota in (name for name in figures if name.endswith(" quota")):
        base = quota.removesuffix(" quota")
        ways = {"global": base, "quota": quota, "local": f"{base} local"}
        if f"{base} radix" in figures:
            ways["global by radix"] = f"{base} radix"
        costs = {way: figures[row]["agree_seconds"]["median"] for way, row in ways.items()}
        listed = ", ".join(f"{way} {seconds * 1e3:.2f}" for way, seconds in costs.items())
        ratio = costs["global"] / costs["quota"]
        notes.append(f"agreement of {base}, ms: {listed}; global / quota {ratio:.2f}")
    slack = figures[slack_name(shape)]
    equal = "bitwise equal" if slack["equal_to_dropless"] else "NOT EQUAL"
    cost = 1 / slack["speedup"] - 1
    notes.append(f"{slack_name(shape)} against {DROPLESS}: {cost:+.1%} time, outputs {equal}")
    return notes
