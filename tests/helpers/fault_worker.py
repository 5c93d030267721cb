"""launch/infer.py with a fault in one rank, for test_faults.py.

    torchrun --nproc-per-node 3 tests/helpers/fault_worker.py kill 1 26 --config ...

injects the fault into rank 1 in its 26th call of an MoE layer; what follows is infer.py's own
command line. `none` injects nothing.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SEEN_S = 0.4  # longer than the heartbeat period: the others have received its progress


# Where a rank may hang outside of the lockstep: fault -> module, function.
HANGS = {
    "hang loading": ("engine.weights.reader", "_read_job"),
    "hang scanning": ("engine.batch.file_job", "scan_input"),
    "hang merging": ("engine.batch.ledger.ledger", "DurableWriter"),
}


def inject(fault: str, victim: int, call: int) -> None:
    """Make this process fail at the given call if it is rank `victim`."""
    if fault == "none" or int(os.environ["RANK"]) != victim:
        return
    if fault == "skip":
        skip_exchange(call)
    elif fault == "mismatch":
        skip_all_to_all(call)
    elif fault == "kill reading":
        die_reading(call)
    elif fault in HANGS:
        hang_in(*HANGS[fault])
    else:
        break_layer(fault, call)


def announce() -> None:
    """Print when it happens, on the clock that all processes of a machine share."""
    print(f"fault at {time.monotonic()}", file=sys.stderr, flush=True)


def skip_exchange(call: int) -> None:
    """Skip one exchange of control messages: this rank goes on with those of the one before."""
    from engine.generation.control import ControlPlane

    exchange, count, last = ControlPlane.exchange, 0, None

    def skipping(self: ControlPlane, *args: Any, **kwargs: Any) -> Any:
        nonlocal count, last
        count += 1
        if count == call:
            announce()
        else:
            last = exchange(self, *args, **kwargs)
        return last

    ControlPlane.exchange = skipping  # pyright: ignore[reportAttributeAccessIssue]


def skip_all_to_all(call: int) -> None:
    """Skip one all-to-all; the sizes of the next one do not fit those of the other ranks."""
    import torch.distributed as dist

    all_to_all, count = dist.all_to_all_single, 0

    def skipping(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            announce()
            return None
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = skipping


def die_reading(call: int) -> None:
    """Die before the tokens of a step are read that was launched before the one now running."""
    from engine.generation.late.late_step import LateStep

    read, count = LateStep.read, 0

    def dying(self: LateStep) -> Any:
        nonlocal count
        count += 1
        if count == call:
            time.sleep(SEEN_S)
            announce()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self)

    LateStep.read = dying


def hang_in(module: str, name: str) -> None:
    """Hang in a function when it is called."""
    import importlib

    def stuck(*args: Any, **kwargs: Any) -> NoReturn:
        announce()
        time.sleep(600)
        raise AssertionError("the test kills it")

    setattr(importlib.import_module(module), name, stuck)


def break_layer(fault: str, call: int) -> None:
    """Raise, hang, stop or die when an MoE layer routes its tokens for the given time."""
    from engine.moe.layer import MoELayer

    route, steps, count = MoELayer.route, MoELayer.steps, 0

    def breaks() -> None:
        nonlocal count
        count += 1
        if count == call:
            time.sleep(SEEN_S)
            announce()
            if fault == "raise":
                raise ArithmeticError("the experts summed to 7 and a half")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "hang":
                time.sleep(600)

    def broken(self: MoELayer, *args: Any, **kwargs: Any) -> Any:
        breaks()
        return route(self, *args, **kwargs)

    def broken_where_routed(self: MoELayer, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("routing") is not None:  # by the router of transformers' model
            breaks()
        return steps(self, *args, **kwargs)

    MoELayer.route = broken  # pyright: ignore[reportAttributeAccessIssue]
    MoELayer.steps = broken_where_routed  # pyright: ignore[reportAttributeAccessIssue]


def run(argv: list[str]) -> NoReturn:
    """Inject the fault, run infer.py and exit as it does."""
    fault, victim, call, *rest = argv
    inject(fault, int(victim), int(call))
    script = ROOT / "launch" / "infer.py"
    sys.argv = [str(script), *rest]
    runpy.run_path(str(script), run_name="__main__")
    raise AssertionError("infer.py always exits")


if __name__ == "__main__":
    run(sys.argv[1:])
