"""Capacity report: cost in quality and gain in time of capacity policies, on trained checkpoints.

    python tools/capacity_report.py --out DIR                        # about a quarter of an hour
    python tools/capacity_report.py --domains --out DIR              # ranks see different traffic
    python tools/capacity_report.py --balance --out DIR              # copies of experts, and drops
    python tools/capacity_report.py --config tiny_mixtral_ep8 --ranks 2 --limit 20

Runs one batch job, the checkpoint's evaluation texts and task prompts, under one capacity setting
after another, on real ranks with one thread each, and prints for every model and number of ranks a
table: validation loss, task accuracy (greedy, exact), drops, and the speed bound of the MoE layers.
Then the findings on the usual claims, and one JSON line. --out also writes capacity_report.txt,
.json, .md and a PNG per model.

Capacity is per step, so the batch matters: all prompts are shuffled with --seed, every step
prefills --batch-tokens tokens over all ranks, and tokens of other phases than --phases are not
subject to it; decode is dropless by default. Dropless runs first and is checked against the
checkpoint's metrics.json. Speed is the bound; --timing also times the layer on the recorded rows.

--balance compares dropping with copies of experts (`capacity/balance.py`): placements are planned
from loads of other data than the evaluation's, and the files are balance_report.txt, .json, .md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

from bench.candidate import WorkerError
from bench.environment_record import environment_record
from bench.report import emit
from capacity import balance_tables, figure
from capacity.balance import BalancePanel, run_balance
from capacity.balance_cases import make_cases
from capacity.calibration import calibration_items
from capacity.findings import findings
from capacity.jobs import Item, assign_domains, assign_round_robin, read_items
from capacity.panel import Panel, check_reference, run_panel
from capacity.settings import default_grid, domain_grid, full_grid
from capacity.tables import LEGEND, markdown, panel_record, panel_text
from capacity.timing import TimedShape, time_panel

from engine.config import CapacityConfig, Config
from engine.config.loader import load_config

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Plan:
    """One panel to run."""

    name: str
    config: Config
    ranks: int
    items: list[Item]
    grid: list[CapacityConfig]


def make_grid(options: argparse.Namespace, num_experts: int, ranks: int) -> list[CapacityConfig]:
    """Return the settings of one panel; with one expert per rank the scopes are the same."""
    scopes = ("expert", "rank") if num_experts > ranks else ("expert",)
    common: dict[str, Any] = {"scopes": scopes, "phases": options.phases}
    if options.full:
        return full_grid(options.gammas, **common)
    if options.domains:
        return domain_grid(options.gammas, **common)
    return default_grid(options.gammas, options.factor_gammas, **common)


def load_tokenizer(config: Config) -> Any:
    """Return the tokenizer of one model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.model.tokenizer or config.model.path)


def make_items(config: Config, options: argparse.Namespace) -> list[Item]:
    """Return the job of one model, before it is assigned to ranks."""
    tokenizer = load_tokenizer(config)

    def encode(text: str, special: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    data = options.data or Path(config.model.path, "eval")
    return read_items(data, encode, tokenizer.eos_token_id, options.limit)


def num_experts_of(config: Config) -> int:
    """Return experts of each MoE layer, from the checkpoint's config.json."""
    from engine.models.registry import read_config

    hf_config = read_config(Path(config.model.path))
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (value := getattr(hf_config, name, None)) is not None:
            return int(value)
    raise ValueError(f"--config: {config.model.path} has no MoE layers")


def make_plans(options: argparse.Namespace) -> list[Plan]:
    """Return the panels to run; all errors in the options are found here, before a rank starts.

    Raises:
        ValueError: a config, a setting or a number of ranks that cannot run.
    """
    assign = assign_domains if options.domains else assign_round_robin
    plans = []
    for name in options.config:
        config = load_config(name, options.set)
        experts = num_experts_of(config)
        items = make_items(config, options)
        for ranks in options.ranks:
            if not 2 <= ranks <= experts:
                raise ValueError(f"--ranks {ranks}: must be from 2 to {name}'s {experts} experts")
            grid = make_grid(options, experts, ranks)
            for setting in grid:  # making a config checks it
                replace(config, moe=replace(config.moe, capacity=setting))
            plans.append(Plan(name, config, ranks, assign(items, ranks, options.seed), grid))
    return plans


def run_report(options: argparse.Namespace) -> tuple[list[Panel], dict[str, Any]]:
    """Run every model on every number of ranks; return the panels and the JSON record."""
    panels, records = [], []
    whole = options.limit is None and options.data is None and not options.domains
    for plan in make_plans(options):
        panel = run_panel(
            plan.name,
            plan.ranks,
            plan.items,
            plan.grid,
            batch_tokens=options.batch_tokens,
            overrides=options.set,
        )
        if options.timing is not None:
            print(f"{plan.name}, {plan.ranks} ranks: timing ...", file=sys.stderr, flush=True)
            panel = time_panel(panel, options.timing, everything=options.timing_all)
        check = check_reference(panel, Path(plan.config.model.path)) if whole else None
        panels.append(panel)
        records.append(panel_record(panel, check))
    record = {
        "bench": "capacity_report",
        **environment_record(("torch", "transformers", "numpy")),
        "options": _plain(options),
        "panels": records,
        "findings": [finding.record() for finding in findings(panels)],
    }
    return panels, record


def run_balance_report(options: argparse.Namespace) -> tuple[list[BalancePanel], dict[str, Any]]:
    """Run the balance panels; return them and the JSON record."""
    panels = []
    for plan in make_plans(options):
        panels.append(
            run_balance(
                plan.name,
                plan.ranks,
                plan.items,
                calibration_items(
                    load_tokenizer(plan.config),
                    plan.items,
                    options.calibration_steps * options.batch_tokens,
                    options.seed,
                ),
                make_cases(Path(plan.config.model.path).name, plan.ranks, options.copies),
                batch_tokens=options.batch_tokens,
                overrides=options.set,
                seed=options.seed,
            )
        )
    record = {
        "bench": "balance_report",
        **environment_record(("torch", "transformers", "numpy")),
        "options": _plain(options),
        "panels": [balance_tables.panel_record(panel) for panel in panels],
    }
    return panels, record


def balance_text(panels: Sequence[BalancePanel], options: argparse.Namespace) -> str:
    """Return everything that is printed before the JSON line."""
    head = (
        f"Prompts shuffled with seed {options.seed}, assigned round robin; steps of up to "
        f"{options.batch_tokens:,} tokens over all ranks; Token Drop of prefill, scope rank. "
        "Calibration: training texts, and task prompts outside the evaluation set."
    )
    parts = [head, *map(balance_tables.panel_text, panels), balance_tables.LEGEND]
    return "\n\n".join(parts)


def report_text(panels: Sequence[Panel], record: dict[str, Any], options: Any) -> str:
    """Return everything that is printed before the JSON line."""
    assigned = "each rank has domains of its own" if options.domains else "assigned round robin"
    head = (
        f"Prompts shuffled with seed {options.seed}, {assigned}; steps of up to "
        f"{options.batch_tokens:,} tokens over all ranks; phases under capacity: "
        f"{', '.join(options.phases)}."
    )
    parts = [head]
    for panel, entry in zip(panels, record["panels"], strict=True):
        parts.append(panel_text(panel) + _reference_line(entry["reference_check"]))
    parts.append(LEGEND)
    if options.timing is not None:
        parts[-1] += f"\nmeasured        layer speedup on {options.timing.text}"
    lines = [f"- {finding.sentence()}" for finding in findings(panels) if finding.pairs]
    parts.append("\n".join(["Findings (pairs of settings that differ in one factor)", *lines]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the report; return the exit code, 1 where dropless differs from metrics.json."""
    options = _parse(argv)
    if options.balance:
        made, record = run_balance_report(options)
        emit(balance_text(made, options), record, options.out, "balance_report")
        text = balance_tables.markdown(made)
        if options.markdown:
            print(f"\n{text}")
        if options.out is not None:
            (options.out / "balance_report.md").write_text(text, encoding="utf-8")
        return 0
    if options.out is not None:
        figure.check_available()
    panels, record = run_report(options)
    emit(report_text(panels, record, options), record, options.out, "capacity_report")
    if options.markdown:
        print(f"\n{markdown(panels)}")
    if options.out is not None:
        (options.out / "capacity_report.md").write_text(markdown(panels), encoding="utf-8")
        for name in options.config:
            chosen = [panel for panel in panels if panel.model == name]
            figure.draw(chosen, options.out / f"capacity_report_{Path(name).stem}.png")
    checks = [entry["reference_check"] for entry in record["panels"]]
    return 1 if any(check is not None and not check["matches"] for check in checks) else 0


def _reference_line(check: dict[str, Any] | None) -> str:
    if check is None:
        return ""
    if check["matches"]:
        return "\ndropless reproduces metrics.json: loss and every task's accuracy"
    return (
        f"\nDROPLESS DIFFERS from metrics.json (here, there): {check['loss']}, {check['accuracy']}"
    )


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    # Paths of one machine mean nothing on another.
    plain = {**vars(options), "data": None if options.data is None else options.data.name}
    plain["timing"] = None if options.timing is None else asdict(options.timing)
    return {name: value for name, value in plain.items() if name != "out"}


def _phases(text: str) -> list[str]:
    phases = text.split(",")
    if unknown := [name for name in phases if name not in PHASES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: must be of {', '.join(PHASES)}")
    return phases


def _shape(text: str) -> TimedShape:
    try:
        hidden, ffn, tokens = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be HIDDEN,FFN,TOKENS") from None
    if min(hidden, ffn, tokens) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every number must be at least 1")
    return TimedShape(hidden=hidden, ffn=ffn, tokens=tokens)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words: Any = lambda text: text.split(",")  # noqa: E731
    numbers: Any = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    models = ["tiny_mixtral_ep8", "tiny_olmoe_ep4"]
    parser.add_argument("--config", type=words, default=models, metavar="NAME,NAME")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: the checkpoint's eval/")
    parser.add_argument(
        "--ranks", type=numbers, metavar="N,N", help="default: 2,4,8; with --balance 4,8"
    )
    parser.add_argument("--gammas", type=words, default=["2", "1.5", "1", "0.5"], metavar="G,G")
    parser.add_argument(
        "--factor-gammas",
        type=words,
        default=["1"],
        metavar="G,G",
        help="where one factor is varied at a time",
    )
    grids = parser.add_mutually_exclusive_group()
    grids.add_argument("--full", action="store_true", help="the product of all factors: hours")
    grids.add_argument("--domains", action="store_true", help="each rank sees domains of its own")
    grids.add_argument("--balance", action="store_true", help="copies of experts, and drops")
    parser.add_argument(
        "--copies",
        type=numbers,
        default=[1, 2, 4, 8],
        metavar="N,N",
        help="int4 copies per layer, with --balance",
    )
    parser.add_argument(
        "--calibration-steps",
        type=int,
        default=16,
        metavar="N",
        help="of each kind of traffic, with --balance",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="items of each domain")
    parser.add_argument("--phases", type=_phases, default=["prefill"], metavar="P,P")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        help="of a step, all ranks; default: 16384, with --balance 8500",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument(
        "--timing",
        type=_shape,
        metavar="D,F,T",
        help="measure the settings on a front: hidden, ffn, tokens per step, e.g. 512,1024,4096",
    )
    parser.add_argument("--timing-all", action="store_true", help="measure all settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--markdown", action="store_true", help="also print the Markdown table")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for text, JSON, PNG")
    options = parser.parse_args(argv)
    if options.ranks is None:
        options.ranks = [4, 8] if options.balance else [2, 4, 8]
    if options.batch_tokens is None:
        options.batch_tokens = 8500 if options.balance else 16384
    if options.calibration_steps < 1 or min(options.copies) < 1:
        raise ValueError("--calibration-steps and --copies must be at least 1")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
