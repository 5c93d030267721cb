"""The capture checker of the emulated device: what a capture forbids, and replays.

Run: pytest tests/gpu/emulated/graphs/test_capture.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.ops.paged_attention import paged_attention
from engine.ops.silu_and_mul import silu_and_mul
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE, CaptureError
from tests.gpu.emulated.graphs.cuda_graph import check_replays
from tests.gpu.emulated.guard import obstacle
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

CUDA = torch.device("cuda", 0)
HERE = r"test_capture\.py:\d+"


@pytest.fixture(autouse=True)
def emulated(guard: Path) -> Iterator[None]:
    """Run every test of one process on an emulated GPU."""
    with emulated_cuda(guard):
        yield


def upload(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).pin_memory().to(CUDA, non_blocking=True)


def captured(run: Callable[[], Any]) -> Any:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph, made


def item(x: torch.Tensor) -> None:
    x.sum().item()


def truth(x: torch.Tensor) -> None:
    assert x.sum() >= 0 or True


def rows_by_mask(x: torch.Tensor) -> None:
    x[x > 0]


def synchronize_an_event(x: torch.Tensor) -> None:
    event = torch.cuda.Event()
    event.record()
    event.synchronize()


def timed_event(x: torch.Tensor) -> None:
    torch.cuda.Event(enable_timing=True).record()


def pinned_copy(x: torch.Tensor) -> None:
    if not torch.cuda.is_current_stream_capturing():
        PINNED.append(torch.tensor([1.0, 2, 3]).pin_memory())
    x.copy_(PINNED[-1], non_blocking=True)


PINNED: list[torch.Tensor] = []

FORBIDDEN: dict[Callable[[torch.Tensor], object], str] = {
    item: "_local_scalar_dense",
    truth: "_local_scalar_dense",
    rows_by_mask: "a mask",
    synchronize_an_event: "an event",
    timed_event: "an event with timing",
    pinned_copy: "a copy from the host",
    lambda x: x.cpu(): "a copy to the host",
    lambda x: x.tolist(): "a copy to the host",
    lambda x: x.to("cpu", non_blocking=True): "a copy to the host",
    lambda x: x.nonzero(): "nonzero",
    lambda x: x.copy_(torch.tensor([1.0, 2, 3])): "a copy from",
    lambda x: x + torch.ones(3).to(CUDA): "a copy from",
    lambda x: x + upload([1, 2, 3]): "memory is pinned",
    lambda x: torch.cuda.synchronize(): "the device",
    lambda x: torch.cuda.current_stream().synchronize(): "a stream",
    lambda x: torch.cuda.Event().query(): "an event is queried",
}


@pytest.mark.parametrize("step", FORBIDDEN)
def test_a_capture_names_the_line_of_what_it_forbids(step: Callable[[torch.Tensor], Any]) -> None:
    x = upload([1, 2, 3])
    with pytest.raises(CaptureError, match=f"{HERE}: .*{FORBIDDEN[step]}.* in a capture"):
        captured(lambda: step(x))
    assert not torch.cuda.is_current_stream_capturing()
    assert x.tolist() == [1, 2, 3]  # which waits again


def test_a_replay_gives_what_eager_gives_for_other_inputs() -> None:
    x, total = upload([1, 2, 3]), upload([0, 0, 0])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.empty_like(x)
        torch.mul(x, 2, out=made)
        made[1:] += 1
        total.add_(made.view(3, 1)[:, 0])
        order = torch.argsort(x, descending=True)
        return made.index_select(0, order), total.cumsum(0)

    fills = [lambda each=each: x.copy_(upload(each)) for each in ([1, 2, 3], [5, 0, -1], [2, 2, 9])]
    assert check_replays(run, fills).recorder is not None


def test_nothing_runs_in_a_capture_and_results_are_nonsense_before_a_replay() -> None:
    x = upload([1, 2, 3])
    graph, made = captured(lambda: x.add_(1) * 2)
    assert x.tolist() == [2, 3, 4], "the warm-up alone"
    assert made.tolist() != [6, 8, 10]
    graph.replay()
    assert x.tolist() == [3, 4, 5] and made.tolist() == [6, 8, 10]
    graph.replay()
    assert made.tolist() == [8, 10, 12]


def test_a_replay_is_one_launch_without_a_wait() -> None:
    x = upload([1, 2, 3])
    graph, _ = captured(lambda: (x + 1) * 2)
    DEVICE.reset_counts()
    graph.replay()
    assert dict(DEVICE.kernels) == {"graph": 1} and not DEVICE.syncs


def test_memory_from_before_the_capture_that_is_gone_is_found_at_the_replay() -> None:
    x, weights = upload([1, 2, 3]), [upload([2, 2, 2])]
    graph, made = captured(lambda: x * weights[0])
    graph.replay()
    assert made.tolist() == [2, 4, 6]
    weights.clear()
    with pytest.raises(CaptureError, match=rf"{HERE}: mul of a tensor \[3\].* memory is gone"):
        graph.replay()


def test_memory_of_the_capture_stays_with_the_graph() -> None:
    x = upload([1, 2, 3])
    graph, made = captured(lambda: (torch.arange(3, device=CUDA) + x) * 2)
    graph.replay()
    assert made.tolist() == [2, 6, 10]


@pytest.mark.parametrize("kind", ["a number", "a shape", "another tensor", "a branch"])
def test_a_python_value_that_changes_between_replays_is_found_with_its_line(kind: str) -> None:
    x, others = upload([1, 2, 3]), [upload([7, 7, 7]), upload([8, 8, 8])]
    state = {"call": 0}

    def run() -> torch.Tensor:
        call = state["call"]
        if kind == "a number":
            return x * call
        if kind == "a shape":
            return x[: 1 + call].clone()
        if kind == "a branch" and call:
            return (x + 1).exp()
        return x + others[call] if kind == "another tensor" else x.exp()

    fills = [lambda call=call: state.update(call=call) for call in (0, 1)]
    with pytest.raises(CaptureError, match=f"replay 1 differs from eager: .*{HERE}: "):
        check_replays(run, fills)


def test_a_kernel_is_recorded_whole_and_loaded_before_a_capture() -> None:
    x = upload([[1, 2, 3, 4]])
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(CaptureError, match="the kernel silu_and_mul runs for the first time"),
        torch.cuda.graph(graph),
    ):
        silu_and_mul(x)
    made = check_replays(
        lambda: silu_and_mul(x), [lambda: x.fill_(2), lambda: x.copy_(upload([[4, 3, 2, 1]]))]
    )
    assert made.recorder is not None
    assert [each.name for each in made.recorder.operations] == ["silu_and_mul"]


def test_attention_reads_its_lengths_where_a_replay_finds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 6, 1, 4, 8, generator=generator).pin_memory().to(CUDA)
    q_THD = torch.randn(3, 2, 8, generator=generator).pin_memory().to(CUDA)
    ints = torch.tensor([0, 1, 2, 3, 0, 0, 0], dtype=torch.int32).pin_memory().to(CUDA)
    table = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32).pin_memory().to(CUDA)

    def run() -> torch.Tensor:
        return paged_attention(
            q_THD,
            keys,
            values,
            ints[:4],
            ints[4:],
            table,
            query_lens=[1, 1, 1],
            context_lens=[8, 8, 8],
            scale=1.0,
            window=None,
        )

    def fill(contexts: list[int]) -> None:
        ints[4:].copy_(torch.tensor(contexts, dtype=torch.int32).pin_memory(), non_blocking=True)

    check_replays(run, [lambda each=each: fill(each) for each in ([1, 5, 8], [7, 2, 0])])
    assert run()[2].abs().sum() == 0, "an idle row"


def on_ranks(rank: int, guard: Path, fault: str) -> Any:
    """Capture collectives; return what replays give for other inputs, or the error."""
    os.environ["LOCKSTEP_NATIVE"] = "0"
    tree = {"model": {"path": "unused"}, "runtime": {"device": "cuda", "timeout_s": 30.0}}
    with emulated_cuda(guard):
        topology = bootstrap.start(config_from_tree(tree))
        group, device = topology.world.handle, topology.device
        x = torch.full((2,), 0, device=device)
        gathered = torch.zeros(4, dtype=x.dtype, device=device)
        left = []

        def run() -> torch.Tensor:
            if fault == "waited for too late" and left:
                left.pop().wait()
            work: Any = dist.all_gather_single(gathered, x, group=group, async_op=True)
            if fault == "no wait" and torch.cuda.is_current_stream_capturing():
                return x
            if fault == "waited for too late" and not torch.cuda.is_current_stream_capturing():
                left.append(work)
                return x
            work.wait()
            return gathered + 1

        try:
            made = check_replays(run, [lambda n=n: x.fill_(10 * rank + n) for n in range(3)])
        except CaptureError as error:
            DEVICE.claims = []
            found = str(error)
        else:
            made.replay()
            found = gathered.tolist()
        bootstrap.stop(topology)
    return found


def test_collectives_are_replayed_on_all_ranks(guard: Path) -> None:
    assert run_ranks(on_ranks, 2, guard, "") == [[2, 2, 12, 12]] * 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no wait", f"all_gather from .*{HERE} was not waited for in the capture"),
        ("waited for too late", f"all_gather from .*{HERE} is waited for on the other side"),
    ],
)
def test_a_collective_is_waited_for_on_its_side_of_a_capture(
    guard: Path, fault: str, words: str
) -> None:
    for found in run_ranks(on_ranks, 2, guard, fault):
        assert re.search(words, found), found
