"""Check transports: MoE calls by moe.dispatch.transport on all GPUs, against sums without any.

    python tools/check_transports.py                        # symmetric, deepep and te_ep
    python tools/check_transports.py --transports deepep --width 4096 --experts-per-rank 2

Starts torchrun with a rank per GPU, once per transport: one that hangs or aborts ends alone.
An expert multiplies each row by its number and adds half of it, so every rank knows what its own
tokens must become. Calls: few tokens and many, skewed loads, dropped assignments, ranks without
tokens; the host may wait nowhere between dispatch and combine. Prints a line of JSON per transport:
the largest relative error, the microseconds per call, the bytes that were reserved, or why it
cannot run here. Exit code 1: a transport runs and is wrong, or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.moe.dispatch.plan import ExpertOrder
from engine.moe.dispatch.transports.choice import TransportPool
from engine.moe.dispatch.transports.transport import DeviceTransport, Limits, Outgoing, Setup
from engine.ops.permute import combine_rows
from engine.ops.sort_by_expert import sort_by_expert

NAMES = ("symmetric", "deepep", "te_ep")
# Partial sums are rounded to bfloat16 before they are added.
ERROR_BOUND = 2.0**-6
LIMIT_S = 120.0  # of one transport, its start included
ROUNDS = 20


def main(argv: list[str] | None = None) -> int:
    """Check the transports, or be a rank of one."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--transports", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--width", type=int, default=2048, help="numbers per row")
    parser.add_argument("--experts-per-rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank in the largest call")
    options = parser.parse_args(argv)
    names = options.transports.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"--transports: {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    if "LOCAL_RANK" in os.environ:
        return _rank(names[0], options)
    ranks = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks < 2:
        reason = f"it needs two GPUs or more, and {ranks} can be seen"
        for name in names:
            print(json.dumps({"transport": name, "not_here": reason}))
        return 0
    return max(_start(name, ranks, options) for name in names)


def _start(name: str, ranks: int, options: argparse.Namespace) -> int:
    """Run the ranks of one transport; return the exit code."""
    sizes = {
        "width": options.width,
        "experts-per-rank": options.experts_per_rank,
        "top-k": options.top_k,
        "tokens": options.tokens,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__, f"--transports={name}"]
    command += [f"--{key}={value}" for key, value in sizes.items()]
    try:
        code = subprocess.run(command, timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        code = 124
    if code:
        print(json.dumps({"transport": name, "failed": f"exit code {code}"}), flush=True)
    return int(code != 0)


def _rank(name: str, options: argparse.Namespace) -> int:
    """Check one transport on this rank; return the exit code."""
    tree = {
        "model": {"path": "unused"},
        "runtime": {"device": "cuda"},
        "moe": {"dispatch": {"transport": name}},
    }
    config = config_from_tree(tree)
    topology = bootstrap.start(config)
    group = topology.expert
    setup = Setup(
        group=group,
        device=topology.device,
        dtype=torch.bfloat16,
        width=options.width,
        first_experts=tuple(
            range(0, options.experts_per_rank * group.size + 1, options.experts_per_rank)
        ),
        top_k=options.top_k,
    )
    found: dict[str, Any] = {"transport": name, "ranks": group.size}
    try:
        transport = TransportPool().get(
            setup, config.moe, experts="", takes_device_counts=True, has_copies=False
        )
        assert transport is not None
        sent = options.tokens * options.top_k
        most = group.size * options.tokens * min(options.top_k, options.experts_per_rank)
        found["bytes"] = transport.reserve(Limits(tokens=options.tokens, sent=sent, received=most))
    except ValueError as error:
        found["not_here"] = str(error)
    else:
        found |= _measure(transport, setup, options.tokens)
    if group.rank == 0:
        print(json.dumps(found), flush=True)
    bootstrap.stop(topology)
    return int(found.get("error", 0.0) > ERROR_BOUND)


def _measure(transport: DeviceTransport, setup: Setup, tokens: int) -> dict[str, Any]:
    """Return the largest relative error over all ranks, and microseconds per call."""
    rank, size = setup.group.rank, setup.group.size
    error, times = torch.zeros(1, device=setup.device), {}
    few = min(64, tokens)
    calls = [(few, 0.0), (few, 0.3), (tokens, 0.0), (tokens, 0.5)]
    for number, (count, dropped) in enumerate(calls):
        of_rank = [count, count // 3, 0, count // 2]
        counts = [of_rank[each % 4] for each in range(size)]
        outgoing = _routed(setup, counts[rank], max(counts), dropped, 10 * number + rank)
        made_TD = _call(transport, setup, outgoing)  # compiles what it needs
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(ROUNDS):
            made_TD = _call(transport, setup, outgoing)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        times[f"{count} tokens, {dropped:.0%} dropped"] = (
            (time.perf_counter() - began) / ROUNDS * 1e6
        )
        right_TD = _expected(outgoing)
        off = (made_TD.double() - right_TD).norm() / right_TD.norm().clamp(min=1e-9)
        error = error.maximum(off.nan_to_num(nan=torch.inf).float()[None])
    torch.distributed.all_reduce(error, torch.distributed.ReduceOp.MAX, setup.group.handle)
    return {"error": float(error), "bound": ERROR_BOUND, "us": times}


def _routed(setup: Setup, count: int, most: int, dropped: float, seed: int) -> Outgoing:
    """Return a rank's tokens, which prefer the first experts."""
    generator, device = torch.Generator().manual_seed(seed), setup.device
    total = setup.first_experts[-1]
    x_TD = torch.randn(count, setup.width, generator=generator).bfloat16().to(device)
    score_TE = torch.rand(count, total, generator=generator) - torch.arange(total) / total / 2
    ids_TK = score_TE.topk(setup.top_k).indices
    lost_TK = torch.rand(count, setup.top_k, generator=generator) < dropped
    ids_TK = ids_TK.masked_fill(lost_TK, -1).to(device)
    weights_TK = torch.rand(count, setup.top_k, generator=generator).to(device)
    order = ExpertOrder(*sort_by_expert(ids_TK, total))
    return Outgoing(x_TD, ids_TK, weights_TK, order, most_tokens=most)


def _call(transport: DeviceTransport, setup: Setup, outgoing: Outgoing) -> torch.Tensor:
    """Return the sums of a rank's tokens."""
    arrived = transport.dispatch(outgoing).wait()
    place_R = torch.arange(arrived.rows_RD.shape[0], device=setup.device)
    expert_R = torch.searchsorted(arrived.places_e.cumsum(0), place_R, right=True)
    number_R1 = (expert_R + setup.first_experts[setup.group.rank] + 1)[:, None].bfloat16()
    return combine_rows(*transport.combine(arrived, arrived.rows_RD * number_R1 + number_R1 / 2))


def _expected(outgoing: Outgoing) -> torch.Tensor:
    """Return what the sums must be, in float64."""
    number_TK = (outgoing.ids_TK + 1).bfloat16()
    term_TKD = outgoing.x_TD[:, None] * number_TK[..., None] + (number_TK / 2)[..., None]
    weights_TK = outgoing.weights_TK.masked_fill(outgoing.ids_TK < 0, 0.0)
    return (term_TKD.double() * weights_TK[..., None]).sum(1)


if __name__ == "__main__":
    sys.exit(main())
