"""The batch job names known trouble: two real ranks, one condition at a time.

Run: pytest tests/distributed/test_verdicts.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def found(*names: str, timeout: float) -> dict:
    """What tools/bench_straggler.py says of each trouble."""
    command = [sys.executable, "tools/bench_straggler.py", "--only", ",".join(names)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert run.stdout, run.stderr
    return json.loads(run.stdout.splitlines()[-1])["troubles"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of two ranks")
def test_trouble_is_named_and_its_absence_too():
    names = ("balanced", "hot_expert", "throttled", "stalled")
    troubles = found(*names, timeout=240)
    wrong = {name: troubles[name]["verdicts"] for name in names if not troubles[name]["right"]}
    assert not wrong


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("tc") or not shutil.which("ip"),
    reason="a slow link takes root, ip and tc",
)
def test_a_slow_link_is_named_with_about_its_rate():
    entry = found("slow_link", timeout=120)["slow_link"]
    assert entry["right"], entry["verdicts"]
    assert entry["lost"]["network"] < entry["seconds"]
