"""The barrier over the store: no rank passes before all have reached it, round after round.

python -m pytest tests/unit/distributed/test_store_barrier.py
"""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

from engine.distributed.store_barrier import barrier

WORLD = 3
ROUNDS = 4


def test_no_rank_passes_before_all_have_reached_it_and_a_key_serves_many_rounds():
    store = dist.HashStore()
    arrived = [0] * ROUNDS
    passed: list[tuple[int, int]] = []

    def rank(number: int) -> None:
        for round_number in range(ROUNDS):
            time.sleep(0.01 * (number * 7 + round_number * 5) % 0.03)
            arrived[round_number] += 1
            barrier(store, "k", WORLD)
            passed.append((round_number, arrived[round_number]))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(passed) == [(number, WORLD) for number in range(ROUNDS) for _ in range(WORLD)]
