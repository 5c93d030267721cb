"""The watchdog's parts that need no second process; the rest is in distributed/test_faults.py.

Run: pytest tests/unit/distributed/health/test_watchdog.py
"""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from engine.distributed.health.reporter import ReportElection
from engine.distributed.health.watchdog import Watchdog, is_connection_error


def test_a_run_of_one_rank_has_no_watch():
    before = threading.active_count()
    watchdog = Watchdog(dist.HashStore(), "alone", rank=0, hosts=["h0"], timeout_s=5.0, holder=None)
    with watchdog:
        assert threading.active_count() == before
        watchdog.fail(ValueError("no"))
        watchdog.explain(RuntimeError("gloo"))  # returns at once


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        RuntimeError("NCCL error: remote process exited or there was a network error"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistStoreError("wait timeout after 5000ms"),
    ],
)
def test_a_broken_connection_is_anothers_fault(error):
    assert is_connection_error(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ValueError("gloo"), OSError("Connection"), None]
)
def test_any_other_error_is_ones_own(error):
    assert not is_connection_error(error)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path


def voices(count: int) -> list[ReportElection]:
    made = [ReportElection("batch/1234") for _ in range(count)]
    for voice in made:
        voice.open()
    return made


def test_one_rank_of_a_host_speaks(folder):
    assert [voice.take() for voice in voices(3)] == [True, False, False]
    assert not list(folder.iterdir())


def test_where_no_file_can_be_made_every_rank_speaks(folder, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder / "missing"))
    assert [voice.take() for voice in voices(2)] == [True, True]


def test_nothing_is_left_of_a_run_without_a_fault(folder):
    for voice in voices(2):
        voice.drop()
    assert not list(folder.iterdir())
