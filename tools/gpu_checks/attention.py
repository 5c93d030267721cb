"""Paged attention at the head sizes of real models and with long contexts: values and bandwidth.

Values against the plain reference on the same device. Blocks are in random order, in a cache with
more slots than 16 bits count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from engine.ops import paged_attention
from gpu_checks.check import Check, Settings, at_most, figure, guarded, not_here, relative_error
from gpu_checks.peaks import seconds_of
from gpu_checks.shapes import BYTES, free_bytes

GROUP = "attention"
BLOCK = 16
BOUND = 1e-2  # relative error of the whole output: roundings of bfloat16
LONG = 32768


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Heads of a layer."""

    name: str
    heads: int
    kv_heads: int
    width: int
    value_width: int | None = None  # latent attention: the value is the first part of the key
    window: int | None = None
    chunk: int | None = None

    def seen(self, context: int) -> int:
        """Return how many keys the last query of a context sees."""
        in_window = min(context, self.window or context)
        return min(in_window, (context - 1) % self.chunk + 1) if self.chunk else in_window


HEADS = (
    *(
        Heads(name=f"head size {width}", heads=16, kv_heads=4, width=width)
        for width in (64, 80, 96, 128, 192, 256)
    ),
    Heads(name="latent 576/512", heads=16, kv_heads=1, width=576, value_width=512),
    Heads(name="head size 128, window 4096", heads=16, kv_heads=4, width=128, window=4096),
    Heads(name="head size 128, chunk 8192", heads=16, kv_heads=4, width=128, chunk=8192),
)


def check_attention(settings: Settings) -> Iterator[Check]:
    """Check a mixed step and long decode of all head sizes; measure the latter's bandwidth."""
    long = 256 if settings.is_tiny else LONG
    mixed = ([1, 1, 7, 130], [17, 700, 7, 600]) if not settings.is_tiny else ([1, 7], [17, 7])
    sequences = 2 if settings.is_tiny else 8
    for heads in HEADS:
        cases = {
            "decode and prefill": mixed,
            f"decode, context {long}": ([1] * 2, [long, long - 5]),
            f"prefill of 64 tokens, context {long}": ([64], [long]),
        }
        for name, lengths in cases.items():
            label = f"{heads.name}, {name}"
            yield from guarded(
                GROUP, label, lambda h=heads, s=lengths, n=label: [_compare(settings, h, s, n)]
            )
        label = f"{heads.name}, {sequences} x {long}, GB/s"
        cached = sequences * long * heads.kv_heads * 2 * heads.width * BYTES
        if free_bytes(settings.device) < 2 * cached:
            yield not_here(GROUP, label, f"needs {2 * cached / 2**30:.0f} GiB")
            continue
        yield from guarded(
            GROUP,
            label,
            lambda h=heads, n=label: [_bandwidth(settings, h, [long] * sequences, n)],
        )


@torch.inference_mode()
def _compare(
    settings: Settings, heads: Heads, lengths: tuple[list[int], list[int]], name: str
) -> Check:
    inputs, options = _inputs(settings.device, heads, *lengths)
    found = paged_attention.paged_attention(*inputs, **options)
    as_float32 = [each.float() if each.is_floating_point() else each for each in inputs]
    expected = paged_attention.paged_attention_reference(*as_float32, **options)
    return at_most(GROUP, name, relative_error(found, expected), BOUND)


@torch.inference_mode()
def _bandwidth(settings: Settings, heads: Heads, contexts: list[int], name: str) -> Check:
    inputs, options = _inputs(settings.device, heads, [1] * len(contexts), contexts)
    run = lambda: paged_attention.paged_attention(*inputs, **options)  # noqa: E731
    seconds = seconds_of(run, settings.device, rounds=2 if settings.is_tiny else 9)
    # A latent key holds the value; a window and a chunk read no more than their tokens.
    values = heads.width if heads.value_width is None else 0
    read = sum(heads.seen(context) for context in contexts)
    total = read * heads.kv_heads * (heads.width + values) * BYTES
    return figure(GROUP, name, total / seconds / 1e9, f"{total / 1e6:.0f} MB in {seconds:.2e} s")


def _inputs(
    device: torch.device, heads: Heads, query_lens: list[int], context_lens: list[int]
) -> tuple[list[Any], dict[str, Any]]:
    torch.manual_seed(0)
    columns = -(-max(context_lens) // BLOCK)
    num_blocks = columns * len(query_lens) + 1

    def normal(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, device=device, dtype=torch.bfloat16).normal_()

    order = torch.randperm(num_blocks)[: columns * len(query_lens)]
    keys = normal(num_blocks, heads.kv_heads, BLOCK, heads.width)
    if heads.value_width is None:
        values = normal(num_blocks, heads.kv_heads, BLOCK, heads.width)
    else:
        values = keys[..., : heads.value_width]
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    inputs = [
        normal(sum(query_lens), heads.heads, heads.width),
        keys,
        values,
        starts.to(device),
        torch.tensor(context_lens).int().to(device),
        order.view(-1, columns).int().to(device),
    ]
    return inputs, {
        "query_lens": query_lens,
        "context_lens": context_lens,
        "scale": heads.width**-0.5,
        "window": heads.window,
        "chunk": heads.chunk,
    }
