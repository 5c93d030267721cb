"""What the tests of the ops share: the instruction sets of this processor, scores that tie, and
paged caches.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from engine.ops import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())


def _supported(isa: str) -> bool:
    if not native.available():
        return False
    default = native.reason().rpartition("(")[2].rstrip(")")
    try:
        torch.ops.lockstep_cpu.select(isa)
    except RuntimeError:
        return False
    torch.ops.lockstep_cpu.select(default)
    return True


BFLOAT16_ISAS_HERE = [isa for isa in native.ISAS if _supported(isa)]
# Those of the float32 kernels: only products with bfloat16 weights differ in avx512_bf16.
ISAS_HERE = [isa for isa in BFLOAT16_ISAS_HERE if isa != "avx512_bf16"]

_INF = float("inf")
# Score, one token's logits, top-k and what is chosen, best first: scores that float32 cannot tell
# apart, of which the best is not the lowest expert.
TIED_SCORES = [
    ("sigmoid", [20.0, 30.0, 25.0, -1.0], 3, [1, 2, 0]),
    ("sigmoid", [-300.0, -120.0, -200.0, -110.0], 3, [3, 1, 2]),
    ("sigmoid", [-_INF, -120.0, -_INF, 3.0e38], 4, [3, 1, 0, 2]),
    ("softmax", [-900.0, -500.0, 0.0, -700.0], 4, [2, 1, 3, 0]),
    ("softmax", [1.0e30, 2.0e30, 3.0e38, 3.0e30], 3, [2, 3, 1]),
    ("softmax", [-_INF, -900.0, 5.0, -_INF], 4, [2, 1, 0, 3]),
    ("sqrt_softplus", [-300.0, -120.0, -200.0, 0.0], 3, [3, 1, 2]),
    ("sqrt_softplus", [1.0e8, 1.0e8 + 8, 1.0e8 - 8, 0.0], 3, [1, 0, 2]),
]


@contextlib.contextmanager
def on_isa(isa: str) -> Iterator[None]:
    """Run the compiled kernels of one instruction set inside the block."""
    default = native.reason().rpartition("(")[2].rstrip(")")
    torch.ops.lockstep_cpu.select(isa)
    try:
        yield
    finally:
        torch.ops.lockstep_cpu.select(default)


def each_isa(function):
    """Run a test once for every instruction set of the float32 kernels that this processor has."""
    return _each(ISAS_HERE, function)


def each_bfloat16_isa(function):
    """Run a test once for every instruction set of the products with bfloat16 weights."""
    return _each(BFLOAT16_ISAS_HERE, function)


def _each(isas: list[str], function):
    if not isas:
        return needs_native(function)
    return pytest.mark.parametrize("isa", isas)(function)


@dataclass
class PagedCase:
    """A ragged step on a shuffled paged cache; unused cache slots hold NaN."""

    q_THD: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table_SB: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The positional arguments of `paged_attention`."""
        starts = [0]
        for length in self.query_lens:
            starts.append(starts[-1] + length)
        return (
            self.q_THD,
            self.k_cache,
            self.v_cache,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(self.context_lens, dtype=torch.int32),
            self.block_table_SB,
        )

    @property
    def lens(self) -> dict[str, list[int]]:
        """The host lists of `paged_attention`."""
        return {"query_lens": self.query_lens, "context_lens": self.context_lens}

    def only(self, sequence: int) -> "PagedCase":
        """The same step with one sequence left."""
        start = sum(self.query_lens[:sequence])
        length = self.query_lens[sequence]
        return PagedCase(
            self.q_THD[start : start + length],
            self.k_cache,
            self.v_cache,
            self.block_table_SB[sequence : sequence + 1],
            [length],
            [self.context_lens[sequence]],
        )


def paged_case(
    lens: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    block_size: int = 16,
    seed: int = 0,
) -> PagedCase:
    """A step of sequences given as (queries, context); value_dim None: v is a prefix view of k."""
    generator = torch.Generator().manual_seed(seed)
    used = [-(-context // block_size) for _, context in lens]
    num_blocks = sum(used) + 3
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    table = torch.zeros(len(lens), max([*used, 1]), dtype=torch.int32)
    k_cache = torch.full((num_blocks, kv_heads, block_size, key_dim), float("nan"))
    separate = value_dim is not None
    v_dim = value_dim if value_dim is not None else max(1, key_dim * 8 // 9)
    v_cache = torch.full((num_blocks, kv_heads, block_size, v_dim), float("nan"))
    first = 0
    for sequence, (_, context) in enumerate(lens):
        blocks = order[first : first + used[sequence]]
        table[sequence, : used[sequence]] = blocks
        first += used[sequence]
        for position in range(context):
            at = (int(blocks[position // block_size]), slice(None), position % block_size)
            k_cache[at] = torch.randn(kv_heads, key_dim, generator=generator)
            v_cache[at] = torch.randn(kv_heads, v_dim, generator=generator)
    if not separate:
        v_cache = k_cache[..., :v_dim]
    tokens = sum(queries for queries, _ in lens)
    q_THD = torch.randn(tokens, heads, key_dim, generator=generator)
    return PagedCase(
        q_THD, k_cache, v_cache, table, [queries for queries, _ in lens], [c for _, c in lens]
    )
