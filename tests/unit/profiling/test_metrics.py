"""Live metrics: what a scrape gets, in a format that Prometheus' own tools accept.

promtool and prometheus are Debian's; where they are missing, the tests with them are skipped.

Run: pytest tests/unit/profiling/test_metrics.py
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.profiling.collector import Collector
from engine.profiling.loads import LoadCounter
from engine.profiling.metrics import WORST, Metrics
from engine.profiling.report import StepReport
from tests.helpers.profiles import Simulation


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        tokens_prefill=100,
        tokens_decode=7,
        running=3,
        waiting=2,
        finished=step,
        max_over_mean=1.0,
        elapsed=0.0,
    )


def simulated(num_ranks: int) -> Collector:
    """Rank `r` works r ms longer than rank 0."""
    simulation = Simulation(num_ranks)
    for turn in range(40):
        late = turn % num_ranks
        simulation.step(
            host=[0.2] * num_ranks,
            attention=[1.0] * num_ranks,
            experts=[3.0 + late if rank == late else 1.0 for rank in range(num_ranks)],
            tokens=[8] * num_ranks,
            rows=[8] * num_ranks,
        )
    return simulation.collectors[0]


def loads_of(num_layers: int) -> LoadCounter:
    loads = LoadCounter()
    for layer in range(num_layers):
        before = [layer + 2, 2]
        loads.record(
            layer,
            before_E=np.array(before),
            rank_before=before,
            own_after=[2],
            own_experts=[0],
        )
    loads.take_rows()
    loads.set_exchanged(np.full((2, num_layers), 2))
    return loads


@contextmanager
def serving(num_ranks: int = 4, num_layers: int = 3) -> Iterator[Metrics]:
    metrics = Metrics("127.0.0.1", 0, tuple(range(num_ranks)))
    try:
        metrics.update(report(5), simulated(num_ranks), loads_of(num_layers))
        yield metrics
    finally:
        metrics.close()


def scrape(metrics: Metrics) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def samples(text: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_scrape_has_what_the_job_has_done_and_which_rank_was_waited_for():
    with serving() as metrics:
        found = samples(scrape(metrics))
    assert found["lockstep_steps_total"] == 5
    assert found['lockstep_tokens_total{kind="prefill"}'] == 100
    assert found['lockstep_requests{state="waiting"}'] == 2
    assert found['lockstep_phase_seconds_total{phase="experts"}'] > 0.03
    waits = [found[f'lockstep_rank_lost_seconds{{rank="{rank}"}}'] for rank in range(4)]
    assert waits == sorted(waits) and waits[3] > 0
    assert found['lockstep_layer_load_ratio{layer="2",when="before"}'] == pytest.approx(4 / 3)
    assert found['lockstep_layer_load_ratio{layer="2",when="after"}'] == 1


def test_the_names_and_labels_of_metrics_are_those_that_dashboards_know():
    with serving(num_ranks=2, num_layers=1) as metrics:
        found = set(samples(scrape(metrics)))
    assert {re.sub(r'="[^"]*"', "", name) for name in found} == {
        "lockstep_steps_total",
        "lockstep_tokens_total{kind}",
        "lockstep_requests_finished_total",
        "lockstep_requests{state}",
        "lockstep_phase_seconds_total{phase}",
        "lockstep_waiting_seconds_total",
        "lockstep_rank_late_ratio{rank}",
        "lockstep_rank_lost_seconds{rank}",
        "lockstep_layer_lost_seconds{layer}",
        "lockstep_layer_load_ratio{layer,when}",
    }


def test_labels_stay_few_however_many_ranks_and_layers_there_are():
    with serving(num_ranks=20, num_layers=60) as metrics:
        found = samples(scrape(metrics))
    ranks = {name for name in found if name.startswith("lockstep_rank_lost_seconds")}
    layers = {name for name in found if name.startswith("lockstep_layer_load_ratio")}
    assert len(ranks) == WORST and len(layers) == 2 * WORST
    assert 'lockstep_layer_load_ratio{layer="59",when="before"}' in layers, "the most uneven one"
    assert len(found) < 80


def test_steps_between_two_snapshots_are_counted_too(monkeypatch):
    now = 100.0
    monkeypatch.setattr("engine.profiling.metrics.time", SimpleNamespace(monotonic=lambda: now))
    metrics = Metrics("127.0.0.1", 0, (0,))
    try:
        collector, loads = simulated(1), loads_of(1)
        for step in range(1, 4):
            metrics.update(report(step), collector, loads)
        assert samples(scrape(metrics))["lockstep_steps_total"] == 1, "one snapshot per second"
        now += 1.0
        metrics.update(report(4), collector, loads)
        found = samples(scrape(metrics))
        assert found["lockstep_steps_total"] == 4
        assert found['lockstep_tokens_total{kind="decode"}'] == 4 * 7
    finally:
        metrics.close()


def test_a_port_in_use_is_an_error_and_a_closed_one_is_free_again():
    with serving() as metrics:
        port = metrics.port
        with pytest.raises(OSError):
            Metrics("127.0.0.1", port, (0,))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_promtool_finds_nothing_to_complain_about():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    with serving() as metrics:
        text = scrape(metrics)
    lint = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    assert lint.returncode == 0 and not lint.stdout + lint.stderr, lint.stdout + lint.stderr


def test_a_real_prometheus_scrapes_it(tmp_path: Path):
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    with serving() as metrics:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\n"
            "scrape_configs:\n"
            "- job_name: lockstep\n"
            f"  static_configs: [{{targets: ['127.0.0.1:{metrics.port}']}}]\n"
        )
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            value = _ask(port, 'lockstep_tokens_total{kind="prefill"}', deadline_s=60)
        finally:
            server.terminate()
            server.wait(timeout=30)
    assert value == 100


def _ask(port: int, query: str, deadline_s: float) -> float | None:
    """The value of a query once Prometheus has one, None when it never does."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if result := json.load(answer)["data"]["result"]:
                    return float(result[0]["value"][1])
        except OSError:
            pass  # it is not up yet
        time.sleep(0.3)
    return None
