"""Random claims of three ranks, and tables of hosts, for the ops that deal rows to instances."""

from __future__ import annotations

import torch

EXPERTS = 6


def tables_of(hosts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends and instances of the hosts of EXPERTS experts, which have between one and `hosts`."""
    generator = torch.Generator().manual_seed(hosts)
    ends_EH = torch.randint(0, 12, (EXPERTS, hosts), generator=generator).cumsum(1)
    hosts_EH1 = torch.full((EXPERTS, hosts + 1), -1)
    numbers = iter(torch.randperm(EXPERTS * hosts, generator=generator).tolist())
    for expert in range(EXPERTS):
        held = 1 + expert % hosts
        hosts_EH1[expert, :held] = torch.tensor([next(numbers) for _ in range(held)])
        ends_EH[expert, held - 1 :] = ends_EH[expert, held - 1].clone()
    return ends_EH, hosts_EH1


def claims_of(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of three ranks, not contiguous, an order of them, and slots by expert in that order."""
    generator = torch.Generator().manual_seed(size)
    code_WB = torch.randint(0, 3 * EXPERTS + 1, (3, size + 2), generator=generator)[:, 2:]
    order_M = torch.randperm(3 * size, generator=generator)
    place_M = code_WB.flatten()[order_M]
    slot_M = torch.empty(3 * size, dtype=torch.int64).scatter_(
        0, place_M.argsort(stable=True), torch.arange(3 * size)
    )
    return code_WB, order_M, slot_M
