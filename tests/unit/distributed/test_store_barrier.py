"""The barrier over the store: nobody passes before all have come, round after round.

python -m pytest tests/unit/distributed/test_store_barrier.py
"""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

from engine.distributed.store_barrier import meet

WORLD = 3
ROUNDS = 4


def test_nobody_passes_before_all_have_come_and_a_key_serves_many_rounds():
    store = dist.HashStore()
    came = [0] * ROUNDS
    seen: list[tuple[int, int]] = []

    def rank(number: int) -> None:
        for round_number in range(ROUNDS):
            time.sleep(0.01 * (number * 7 + round_number * 5) % 0.03)
            came[round_number] += 1
            meet(store, "k", WORLD)
            seen.append((round_number, came[round_number]))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(seen) == [(number, WORLD) for number in range(ROUNDS) for _ in range(WORLD)]
