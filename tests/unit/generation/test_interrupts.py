"""A signal stops the job at once or, while it is deferred, at the next check.

Run: pytest tests/unit/generation/test_interrupts.py
"""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest

from engine.generation.interrupts import Interrupts, Stopped


def send(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_raises_at_once_with_the_shells_exit_code(signum, code):
    with pytest.raises(Stopped) as stopped, Interrupts():
        send(signum)
        pytest.fail("went on after the signal")
    assert stopped.value.exit_code == code and str(stopped.value) == signum.name


def test_a_deferred_signal_is_raised_by_the_check():
    reached = False
    with pytest.raises(Stopped), Interrupts() as interrupts, interrupts.deferred():
        interrupts.check()
        send()
        reached = True
        interrupts.check()
        pytest.fail("the check let it pass")
    assert reached


def test_a_deferred_signal_is_raised_at_the_end_of_the_block():
    with pytest.raises(Stopped), Interrupts() as interrupts:
        with interrupts.deferred():
            send()
        pytest.fail("the block ended without it")


def test_a_peer_that_broke_the_connection_after_the_signal_is_not_the_reason():
    with pytest.raises(Stopped) as stopped, Interrupts() as interrupts, interrupts.deferred():
        send()
        raise RuntimeError("connection closed by peer")
    assert isinstance(stopped.value.__cause__, RuntimeError)


def test_an_error_without_a_signal_passes_unchanged():
    with pytest.raises(KeyError), Interrupts() as interrupts, interrupts.deferred():
        raise KeyError("x")


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def end_by(*signums: str) -> int:
    """The exit code of a process that is inside a deferred block when it gets these signals."""
    sending = "".join(f"    os.kill(os.getpid(), signal.{name})\n" for name in signums)
    code = (
        "import os, signal, sys\nfrom engine.generation.interrupts import Interrupts\n"
        f"with Interrupts() as interrupts, interrupts.deferred():\n{sending}"
        "    os._exit(9)\n"
    )
    return subprocess.run([sys.executable, "-c", code]).returncode


def test_a_second_signal_ends_a_process_that_does_not_stop():
    assert end_by("SIGTERM", "SIGINT") == -signal.SIGINT
    assert end_by("SIGINT", "SIGTERM") == -signal.SIGTERM


def test_a_signal_received_twice_within_a_second_is_one():
    assert end_by("SIGTERM", "SIGTERM") == 9


@pytest.mark.parametrize("signum, at_once", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_sigterm_leaves_time_to_finish_and_sigint_none(signum, at_once):
    now = 100.0
    with (
        pytest.raises(Stopped),
        Interrupts(5.0, lambda: now) as interrupts,
        interrupts.deferred(),
    ):
        assert interrupts.request == (0, False)
        send(signum)
        assert interrupts.request == (signum, at_once)
        now = 104.9
        assert interrupts.request == (signum, at_once)
        now = 105.0
        assert interrupts.request == (signum, True)


@pytest.mark.parametrize("later_s, raised", [(4.0, False), (6.0, True)])
def test_work_that_finished_in_time_clears_the_signal(later_s, raised):
    now = 100.0
    expected = pytest.raises(Stopped) if raised else nullcontext()
    with expected, Interrupts(5.0, lambda: now) as interrupts, interrupts.deferred():
        send()
        now += later_s
        interrupts.finished()


def test_the_same_signal_a_second_later_ends_the_process():
    code = (
        "import os, signal\nfrom engine.generation.interrupts import Interrupts\nnow = 0.0\n"
        "with Interrupts(9.0, lambda: now) as interrupts, interrupts.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    now = 1.0\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM
