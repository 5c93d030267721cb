"""Charging: for whom a group waited, from the ranks' arrivals alone. Pure; part of the collector.

At every collective the rank that arrived last is charged with what the others lost, on average, by
its coming late. Under tensor parallelism there are collectives of one tensor group (TENSOR), in
which its ranks wait for each other. Whoever was held up there comes late to the next collective of
all without a fault of its own: as much of that charge as it had waited goes to whom it waited for.

Worked example, two tensor groups of two ranks. Rank 1 comes 20 ms late to a sum of its group; then
both of its ranks come to a collective of all, rank 0 a little later than rank 1, and 19 ms after
the other group: a mean rank waits some 9.5 ms for rank 0, which had waited 20 for rank 1, so all of
it is rank 1's. In the sum itself one rank of four waited 20 ms: 5 ms of a mean rank, rank 1's too.

Legend: S steps, W ranks of the group, C collectives of a step, T ranks of a tensor group, K charges
of a step.
"""

from __future__ import annotations

import numpy as np


def charge(
    arrivals_SWC: np.ndarray, tensor_SC: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return who is charged, int64 [S, K]; nanoseconds of a mean rank, float64 [S, K]; and at which
    collective, int64 [K].

    arrivals_SWC: int64, of every rank; negative where a tensor group left a TENSOR collective out.
    tensor_SC: bool, whether a collective is TENSOR. size: T; tensor groups follow one another.
    """
    last_SC = arrivals_SWC.argmax(1)
    lost_SC = arrivals_SWC.max(1) - arrivals_SWC.mean(1)
    columns = np.arange(arrivals_SWC.shape[2])
    if size == 1 or not tensor_SC.any():
        return last_SC, lost_SC, columns
    lost_SC[tensor_SC] = 0.0
    num_steps, num_ranks, _ = arrivals_SWC.shape
    group_of_W = np.arange(num_ranks) // size
    steps = np.arange(num_steps)
    # How long each rank was held up by each of its tensor group since the last collective of all.
    held_SWT = np.zeros((num_steps, num_ranks, size))
    who, lost, where = [last_SC], [lost_SC], [columns]
    for column in columns.tolist():
        of_tensor_S = tensor_SC[:, column]
        if of_tensor_S.any():
            here_SGT = arrivals_SWC[:, :, column].reshape(num_steps, -1, size)
            use_SG = of_tensor_S[:, None] & (here_SGT >= 0).all(2)
            latest_SG = here_SGT.argmax(2)
            waited_SGT = (here_SGT.max(2)[:, :, None] - here_SGT) * use_SG[:, :, None]
            held_SWT[steps[:, None], np.arange(num_ranks), latest_SG[:, group_of_W]] += (
                waited_SGT.reshape(num_steps, num_ranks)
            )
            who.append(latest_SG + np.arange(0, num_ranks, size))
            lost.append(waited_SGT.sum(2) / num_ranks)
            where.append(np.full(num_ranks // size, column))
        if not of_tensor_S.all() and held_SWT.any():
            last_S = last_SC[:, column]
            held_ST = held_SWT[steps, last_S] * ~of_tensor_S[:, None]
            total_S = held_ST.sum(1)
            scale_S = np.minimum(1.0, lost_SC[:, column] / np.maximum(total_S, 1.0))
            moved_ST = held_ST * scale_S[:, None]
            lost_SC[:, column] -= moved_ST.sum(1)
            who.append(group_of_W[last_S][:, None] * size + np.arange(size))
            lost.append(moved_ST)
            where.append(np.full(size, column))
            held_SWT[~of_tensor_S] = 0.0
    return np.concatenate(who, axis=1), np.concatenate(lost, axis=1), np.concatenate(where)
