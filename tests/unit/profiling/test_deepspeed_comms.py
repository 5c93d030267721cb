"""DeepSpeed's comms logger: its figures of the collectives that the phase clock recorded.

Run: pytest tests/unit/profiling/test_deepspeed_comms.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.profiling.deepspeed_comms import CommsRow, DeepSpeedComms, open_deepspeed_comms
from engine.profiling.phase_clock import Phase
from tests.helpers.profiles import make_spans

ROOT = Path(__file__).resolve().parents[3]


class FakeLogger:
    """Keeps entries as DeepSpeed's logger does; its averages are the means."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, float, int]] = []
        self.most = 0
        self.resets = 0

    def append(self, raw_name: str, record_name: str, latency: float, msg_size: int) -> None:
        self.entries.append((raw_name, record_name, latency, msg_size))
        self.most = max(self.most, len(self.entries))

    def log_all(self, print_log: bool, *, return_dict: bool) -> dict[str, Any]:
        assert return_dict and not print_log
        summary: dict[str, dict[int, dict[str, float]]] = {}
        for name, size in {(entry[1], entry[3]) for entry in self.entries}:
            own = [entry[2] for entry in self.entries if entry[1:4:2] == (name, size)]
            summary.setdefault(name, {})[size] = {
                "count": len(own),
                "total_latency_ms": sum(own),
                "avg_latency_ms": sum(own) / len(own),
                "tput_avg_gbps": 1.0,
                "busbw_avg_gbps": 0.5,
            }
        return {"summary": summary}

    def reset_data(self) -> None:
        self.resets += 1
        self.entries.clear()


STEP = (
    (Phase.ATTENTION, 0, 0, 2),
    (Phase.CONSENSUS, 0, 2, 3),
    (Phase.DISPATCH, 0, 3, 7),
    (Phase.EXPERTS, 0, 7, 9),
    (Phase.COMBINE, 0, 9, 11),
    (Phase.CONTROL, -1, 11, 12),
)


def test_a_spans_collective_is_logged_with_its_operation_latency_and_what_a_rank_sends():
    logger = FakeLogger()
    DeepSpeedComms(logger, 3).add(make_spans(*STEP))
    # make_spans: 1,000 bytes with each; of an all-gather to two peers, half of that each.
    assert logger.entries == [
        ("all_gather", "all_gather (consensus)", pytest.approx(1.0), 500),
        ("all_to_all_single", "all_to_all_single (dispatch)", pytest.approx(4.0), 1000),
        ("all_to_all_single", "all_to_all_single (combine)", pytest.approx(2.0), 1000),
        ("all_gather", "all_gather (control)", pytest.approx(1.0), 500),
    ]


def test_of_a_tensor_groups_collectives_only_those_it_called_are_logged():
    logger = FakeLogger()
    spans = make_spans((Phase.TENSOR, 0, 0, 2), (Phase.TENSOR, 1, 2, 3))
    spans.arrivals[1] = -1  # its group skipped it
    DeepSpeedComms(logger, 3).add(spans)
    assert logger.entries == [
        ("all_reduce", "all_reduce (tensor)", pytest.approx(2.0), 1000),
    ]


def test_messages_are_counted_up_to_the_next_power_of_two():
    comms = DeepSpeedComms(FakeLogger(), 3)
    for _ in range(3):
        comms.add(make_spans(*STEP))
    assert comms.table()["all_to_all_single (dispatch)"] == [
        CommsRow(1024, 3, 3000, pytest.approx(12.0), pytest.approx(4.0), 1.0, 0.5)
    ]
    assert comms.table()["all_gather (control)"][0].message_bytes == 512


def test_a_long_run_is_summed_in_batches_and_no_entry_is_missing():
    logger = FakeLogger()
    comms = DeepSpeedComms(logger, 3)
    for _ in range(3000):
        comms.add(make_spans(*STEP))
    assert logger.most < 5000, "the logger stores each entry"
    assert comms.table()["all_gather (consensus)"][0].count == 3000
    assert comms.table()["all_gather (consensus)"][0].count == 3000, "asking adds nothing"


def test_the_logger_is_left_as_it_was_found():
    logger = FakeLogger()
    comms = DeepSpeedComms(logger, 2)
    comms.add(make_spans(*STEP))
    comms.close()
    assert not logger.entries and logger.resets == 2


def test_a_rank_alone_has_no_collectives_and_needs_no_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # to import it is an error
    assert open_deepspeed_comms("cpu", 1) is None


def test_deepspeeds_own_logger_gives_the_latencies_that_went_in():
    """In a process of its own: DeepSpeed's import takes seconds and changes the process."""
    code = """
import torch.distributed as dist
from engine.profiling.deepspeed_comms import open_deepspeed_comms
from engine.profiling.phase_clock import Phase
from tests.helpers.profiles import make_spans
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
comms = open_deepspeed_comms("cpu", 2)
for length in (1, 3):
    comms.add(make_spans((Phase.DISPATCH, 0, 0, length)))
(row,) = comms.table()["all_to_all_single (dispatch)"]
print(row.message_bytes, row.count, row.bytes, round(row.total_latency_ms, 6), row.avg_latency_ms)
assert row.tput_avg_gbps > 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    bound, count, num_bytes, total, average = done.stdout.splitlines()[-1].split()
    assert (bound, count, num_bytes, float(total)) == ("1024", "2", "2000", 4.0)
    assert 1.0 <= float(average) <= 3.0
