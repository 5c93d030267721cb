"""deal_rows on CUDA: one Triton program per run of rows.

`deal_rows` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, K top-k, E rows of the tables, H most hosts of an expert.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta


@triton.jit
def host_of(ids, place, ends, hosts, num_hosts, exists):
    """Return the instance of the first host whose end is behind each place; -1 where there is none
    or the row does not exist. The hosts' rows of the table are one longer than those of the ends.
    """
    host = tl.zeros_like(ids)
    for h in range(num_hosts):
        end = tl.load(ends + ids * num_hosts + h, mask=exists, other=0)
        host += (place >= end).to(tl.int64)
    return tl.load(hosts + ids * (num_hosts + 1) + host, mask=exists, other=-1)


# The hosts of an expert change where copies are placed anew, the rows from step to step.
@triton.jit(do_not_specialize=["num_rows", "num_hosts"])
def _deal_rows_kernel(ids, place, ends, hosts, out, num_rows, num_hosts, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_rows
    id_N = tl.load(ids + n, mask=inside, other=-1)
    place_N = tl.load(place + n, mask=inside, other=0)
    instance = host_of(id_N, place_N, ends, hosts, num_hosts, id_N >= 0)
    tl.store(out + n, instance, mask=inside)


def deal_rows_triton(
    ids_TK: torch.Tensor, place_TK: torch.Tensor, ends_EH: torch.Tensor, hosts_EH1: torch.Tensor
) -> torch.Tensor:
    """Triton form of `deal_rows`: same arguments and results."""
    ids_TK, place_TK = ids_TK.contiguous(), place_TK.contiguous()
    out_TK = torch.empty_like(ids_TK)
    if not ids_TK.numel():
        return out_TK
    block = 512
    _deal_rows_kernel[(triton.cdiv(ids_TK.numel(), block),)](
        ids_TK,
        place_TK,
        ends_EH.contiguous(),
        hosts_EH1,
        out_TK,
        ids_TK.numel(),
        ends_EH.shape[1],
        BLOCK=block,
        num_warps=4,
    )
    return out_TK


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: one kernel serves all."""

    def call(tokens: int) -> None:
        ids_TK, place_TK = (meta(tokens, 8, dtype=torch.int64) for _ in range(2))
        tables = (meta(128, hosts, dtype=torch.int64) for hosts in (3, 4))
        deal_rows_triton(ids_TK, place_TK, *tables)

    yield Variant("any number of hosts", call)
