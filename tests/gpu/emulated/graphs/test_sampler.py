"""The sampler in a graph, on the emulated device.

Run: pytest tests/gpu/emulated/graphs/test_sampler.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.generation.sampling.sampler import sample
from engine.generation.sampling.static_sampler import (
    Draws,
    choose_tokens,
    draws_of,
    sampling_table,
)
from engine.request import SamplingParams
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.graphs.cuda_graph import check_replays
from tests.gpu.emulated.guard import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

ROWS, VOCAB = 4, 1500
GREEDY, PLAIN = SamplingParams(), SamplingParams(temperature=0.8, seed=3, min_p=0.01)
FILTERED = SamplingParams(temperature=0.2, top_p=0.9, top_k=20, seed=5)
STEPS = {
    Draws.GREEDY: [[GREEDY] * ROWS] * 2,
    Draws.PLAIN: [[GREEDY, PLAIN, PLAIN, GREEDY], [PLAIN] * ROWS, [GREEDY] * ROWS],
    Draws.FILTERED: [[GREEDY, PLAIN, FILTERED, PLAIN], [FILTERED] * ROWS, [GREEDY] * ROWS],
}


@pytest.mark.parametrize("draws", Draws)
def test_replays_give_the_tokens_of_the_sampler(guard: Path, draws: Draws) -> None:
    with emulated_cuda(guard), torch.inference_mode():
        device = DEVICE.device
        logits = torch.zeros(ROWS, VOCAB, device=device)
        table = torch.zeros(5, ROWS, dtype=torch.float64, device=device)

        def fill(number: int) -> torch.Tensor:
            host = 5 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(number))
            logits.copy_(host.pin_memory(), non_blocking=True)
            params = STEPS[draws][number]
            assert draws_of(params, VOCAB) <= draws
            rows = torch.from_numpy(sampling_table(params, range(ROWS), range(ROWS), VOCAB))
            table.copy_(rows.pin_memory(), non_blocking=True)
            return host

        made = []

        def run() -> torch.Tensor:
            made.append(choose_tokens(logits, table, draws))
            return made[-1]

        steps = range(len(STEPS[draws]))
        graph = check_replays(run, [lambda number=number: fill(number) for number in steps])
        tokens = made[1]  # of the capture
        for number in steps:
            host = fill(number)
            graph.replay()
            expected = sample(host, STEPS[draws][number], range(ROWS), range(ROWS))[0]
            assert tokens.tolist() == expected
