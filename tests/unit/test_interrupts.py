"""A signal stops the job at once or, while it runs, at the next check."""

import os
import signal
import subprocess
import sys

import pytest

from engine.interrupts import Interrupts, Stopped


def send(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_raises_at_once_with_the_shells_exit_code(signum, code):
    with pytest.raises(Stopped) as stopped, Interrupts():
        send(signum)
        pytest.fail("went on after the signal")
    assert stopped.value.exit_code == code and str(stopped.value) == signum.name


def test_a_deferred_signal_waits_for_the_check():
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


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_a_process_that_does_not_stop():
    code = (
        "import os, signal\nfrom engine.interrupts import Interrupts\n"
        "with Interrupts() as interrupts, interrupts.deferred():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM
