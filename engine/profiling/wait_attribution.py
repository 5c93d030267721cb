"""Wait attribution: which rank a group waited for, from the ranks' arrivals alone. Pure.

At every collective the wait is attributed to the straggler, the rank that arrived last: the mean
over all ranks of how long they waited for it. Under tensor parallelism some collectives are of one
tensor group (TENSOR), whose ranks wait for each other. A rank that was delayed there arrives late
at the next collective of all without being the cause: as much of that wait as it had waited itself
is attributed to the rank that delayed it.

Worked example, two tensor groups of two ranks. Rank 1 arrives 20 ms after rank 0 at a sum of their
group. Then both arrive at a collective of all, rank 0 a little after rank 1, and 19 ms after the
other group: a mean rank waits some 9.5 ms for rank 0, which had waited 20 for rank 1, so all of
it is attributed to rank 1. In the sum itself one rank of four waited 20 ms: 5 ms of a mean rank,
attributed to rank 1 too.

Legend: S steps, W ranks of the group, C collectives of a step, T ranks of a tensor group, K
attributions of a step.
"""

from __future__ import annotations

import numpy as np


def attribute_wait(
    arrivals_SWC: np.ndarray, tensor_SC: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ranks waited for, int64 [S, K]; nanoseconds that a mean rank waited for them,
    float64 [S, K]; and at which collective, int64 [K].

    Args:
        arrivals_SWC: int64, of every rank; negative where a tensor group skipped a TENSOR one.
        tensor_SC: bool, whether a collective is TENSOR.
        size: T; the tensor groups are consecutive ranks.
    """
    last_SC = arrivals_SWC.argmax(1)
    wait_SC = arrivals_SWC.max(1) - arrivals_SWC.mean(1)
    columns = np.arange(arrivals_SWC.shape[2])
    if size == 1 or not tensor_SC.any():
        return last_SC, wait_SC, columns
    wait_SC[tensor_SC] = 0.0
    num_steps, num_ranks, _ = arrivals_SWC.shape
    group_of_W = np.arange(num_ranks) // size
    steps = np.arange(num_steps)
    # How long each rank was delayed by each of its tensor group since the last collective of all.
    delay_SWT = np.zeros((num_steps, num_ranks, size))
    ranks, waits, where = [last_SC], [wait_SC], [columns]
    for column in columns.tolist():
        of_tensor_S = tensor_SC[:, column]
        if of_tensor_S.any():  # within each group, on the steps where this collective is TENSOR
            here_SGT = arrivals_SWC[:, :, column].reshape(num_steps, -1, size)
            use_SG = of_tensor_S[:, None] & (here_SGT >= 0).all(2)
            latest_SG = here_SGT.argmax(2)
            waited_SGT = (here_SGT.max(2)[:, :, None] - here_SGT) * use_SG[:, :, None]
            delay_SWT[steps[:, None], np.arange(num_ranks), latest_SG[:, group_of_W]] += (
                waited_SGT.reshape(num_steps, num_ranks)
            )
            ranks.append(latest_SG + np.arange(0, num_ranks, size))
            waits.append(waited_SGT.sum(2) / num_ranks)
            where.append(np.full(num_ranks // size, column))
        if not of_tensor_S.all() and delay_SWT.any():  # of all: move the wait to those who delayed
            last_S = last_SC[:, column]
            delay_ST = delay_SWT[steps, last_S] * ~of_tensor_S[:, None]
            total_S = delay_ST.sum(1)
            scale_S = np.minimum(1.0, wait_SC[:, column] / np.maximum(total_S, 1.0))
            moved_ST = delay_ST * scale_S[:, None]
            wait_SC[:, column] -= moved_ST.sum(1)
            ranks.append(group_of_W[last_S][:, None] * size + np.arange(size))
            waits.append(moved_ST)
            where.append(np.full(size, column))
            delay_SWT[~of_tensor_S] = 0.0
    return np.concatenate(ranks, axis=1), np.concatenate(waits, axis=1), np.concatenate(where)
