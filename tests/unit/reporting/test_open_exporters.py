"""engine/reporting/open_exporters.py: what cannot be opened is said by setting, before a model."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import Config, ModelConfig, ProfilerConfig
from engine.profiling.routing.trace_file import (
    LOADS,
    trace_path,
)
from engine.profiling.routing.writer import TraceEnd
from engine.reporting.open_exporters import check_exporters, join_routing_ends


def check(rank: int = 0, **profiler: Any) -> None:
    config = Config(model=ModelConfig(path="x"), profiler=ProfilerConfig(**profiler))
    group = SimpleNamespace(rank=rank)
    topology: Any = SimpleNamespace(world=group, expert=group, host="h1")
    check_exporters(config, topology)


def test_nothing_is_checked_that_is_off(tmp_path):
    check()
    check(metrics_host="no.such.invalid")
    check(enabled=False, spans="/proc/none")
    check(enabled=False, spans=str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_opened_is_closed_again(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for _ in range(2):
        check(spans=str(tmp_path / "new"), metrics_port=port, routing=str(tmp_path / "routing"))
    assert list((tmp_path / "routing").iterdir()) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_addresses_of_this_host_are_accepted(host):
    check(metrics_port=0, metrics_host=host)


@pytest.mark.parametrize("host", ["no.such.invalid", "192.0.2.1", "a" * 80, "256.0.0.1", "::zz"])
def test_a_host_that_is_not_this_one_is_refused_on_rank_0_alone(host):
    with pytest.raises(ValueError) as caught:
        check(metrics_port=0, metrics_host=host)
    text = str(caught.value)
    assert text.startswith(f"profiler.metrics_host = {host!r}: is no address of h1: ")
    assert "127.0.0.1 for this host alone" in text
    check(rank=1, metrics_port=0, metrics_host=host)


def test_a_port_in_use_is_refused_by_number():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"profiler.metrics_port = {port}: cannot listen at"):
            check(metrics_port=port)


@pytest.mark.parametrize("below", ["file", "file/below", "x" * 300])
@pytest.mark.parametrize("key", ["spans", "routing"])
def test_a_folder_that_cannot_be_made_is_refused_with_one_text_on_all_ranks(tmp_path, below, key):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / below)
    texts = set()
    for rank in range(2):
        with pytest.raises(ValueError) as caught:
            check(rank, **{key: folder})
        texts.add(str(caught.value))
    (text,) = texts
    assert text.startswith(f"profiler.{key} = {folder!r}: cannot be written on h1: ")
    assert "name a folder with room that every rank may write to" in text


def test_a_trace_that_cannot_be_continued_is_refused_by_file(tmp_path):
    path = trace_path(tmp_path, LOADS, 0)
    path.write_text("no trace")
    with pytest.raises(ValueError) as caught:
        check(routing=str(tmp_path))
    assert str(caught.value).startswith(f"{path}: is no routing trace, or its first line is cut")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"Is a directory \(.*loads\.rank00000\.routing\); name a"):
        check(routing=str(tmp_path))


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    from engine.reporting import open_exporters

    monkeypatch.setattr(open_exporters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"deepspeed_comms = True.*pip install deepspeed"):
        check(deepspeed_comms=True)


class MissingCUDAException(Exception):
    """As DeepSpeed's, which some of its ops raise at import without a CUDA toolkit."""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ImportError("No module named x"), "No module named x; pip install deepspeed"),
        (
            MissingCUDAException("CUDA_HOME does not exist"),
            "CUDA_HOME does not exist; install what it asks for, or set profiler.deepspeed_comms",
        ),
        (MissingCUDAException(), "MissingCUDAException; install what it asks for"),
    ],
)
def test_a_deepspeed_that_fails_at_import_is_refused_with_why(monkeypatch, error, text):
    from engine.reporting import open_exporters

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(open_exporters, "open_deepspeed_comms", fail)
    topology: Any = SimpleNamespace(
        world=SimpleNamespace(rank=0),
        expert=SimpleNamespace(size=2),
        device=SimpleNamespace(type="cuda"),
        host="h1",
    )
    config = Config(model=ModelConfig(path="x"), profiler=ProfilerConfig(deepspeed_comms=True))
    unused: Any = None
    with pytest.raises(ValueError, match=f"DeepSpeed cannot be imported on h1: {text}"):
        open_exporters.open_exporters(config, topology, unused, unused)


def test_a_trace_ends_where_the_last_rank_ended_with_rank_0s_fingerprint():
    ends = [TraceEnd(1, 16, 8, "f"), TraceEnd(2, 9, 1), None, TraceEnd()]
    end = join_routing_ends(ends)
    assert end == TraceEnd(2, 16, 8, "f") and end.next_index == 24
    assert TraceEnd().next_index == 0 and join_routing_ends([None]) is None
