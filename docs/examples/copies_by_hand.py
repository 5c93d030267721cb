"""The worked example of docs/balance.md: copies, the exact split and the cut on four ranks.

    python docs/examples/copies_by_hand.py

One layer, one step, no ranks are started: expert 0 has its home on rank 0, 1 on rank 1 and so on.
Rank 1 holds a copy of expert 0, rank 2 one of expert 1. Every number can be found with pen and
paper; the page shows how.
"""

import numpy as np

from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.row_split import RowSplit, SplitRule
from engine.ops.split import cut, rank_loads

# Rows that each source rank (a line) has for experts 0, 1, 2 and 3.
LOADS_WE = np.array([[4, 3, 1, 3], [6, 2, 1, 3], [5, 2, 1, 3], [5, 2, 1, 3]])
# Claims, best first: runs of one expert.
CLAIMS = [0] * 15 + [3] * 5 + [1] * 4 + [0] * 5 + [3] * 7 + [2] * 3 + [1] * 5 + [2] * 1


def show(title: str, instances: Instances, rows_I: np.ndarray, split: RowSplit) -> None:
    """Print the rows of every instance and of every rank."""
    parts = []
    for expert, rank, is_home, rows in zip(
        instances.expert_I, instances.rank_I, instances.is_home_I, rows_I, strict=True
    ):
        what = "home" if is_home else "copy"
        parts.append(f"expert {expert} on rank {rank} ({what}): {rows}")
    print(f"{title}\n  " + "\n  ".join(parts))
    print(f"  rows of the ranks: {rank_loads(rows_I, split.hosts).tolist()}")


def main() -> None:
    """Split, deal and cut."""
    placement = LayerPlacement(home_E=(0, 1, 2, 3), copies_E=((1,), (2,), (), ()))
    instances = Instances(placement, num_ranks=4)
    load_E = LOADS_WE.sum(0)
    print(f"rows of the experts: {load_E.tolist()}, of a mean rank: {load_E.sum() / 4}")

    split = RowSplit(instances, SplitRule())
    rows_I = split.rows(load_E)
    show("copies in the model's precision", instances, rows_I, split)
    print("  rows of each source rank for each of these")
    for rank, row in enumerate(split.deal(LOADS_WE, rows_I).tolist()):
        print(f"  from rank {rank}: {row}")

    low_bit = RowSplit(instances, SplitRule(low_bit=True, target=0.95))
    show("low-bit copies, target 0.95", instances, low_bit.rows(load_E), low_bit)

    limit_W = np.full(4, 9)  # gamma 0.8: C = ceil(0.8 * 45 / 4) = 9, so 36 slots for 4 ranks
    kept_E = cut(np.array(CLAIMS), split.hosts, limit_W)
    print(f"kept under limits of 9 rows: {kept_E.tolist()}")
    show("and split", instances, split.rows(kept_E, limit_W=limit_W), split)


if __name__ == "__main__":
    main()
