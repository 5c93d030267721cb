"""The batch job names known trouble: two real ranks, one condition at a time.

Run: pytest tests/distributed/test_verdicts.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parents[2]


def found(*names: str, timeout: float) -> dict:
    """What tools/bench_straggler.py says of each trouble."""
    command = [sys.executable, "tools/bench_straggler.py", "--only", ",".join(names)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert run.stdout, run.stderr
    return json.loads(run.stdout.splitlines()[-1])["troubles"]


def wrong(*names: str, timeout: float) -> dict[str, list]:
    """The verdicts that are not right. These are real ranks on a real machine, which may have a
    trouble of its own in one run: what is wrong is tried once more, and told.
    """
    for _ in range(2):
        troubles = found(*names, timeout=timeout)
        verdicts = {
            name: troubles[name]["verdicts"] for name in names if not troubles[name]["right"]
        }
        if not verdicts:
            return {}
        names = tuple(verdicts)
        warnings.warn(f"not what was expected: {verdicts}", stacklevel=2)
    return verdicts


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of two ranks")
def test_trouble_is_named_and_its_absence_too():
    assert wrong("balanced", "hot_expert", "throttled", "stalled", timeout=240) == {}


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("tc") or not shutil.which("ip"),
    reason="a slow link takes root, ip and tc",
)
def test_a_slow_link_is_named():
    assert wrong("slow_link", timeout=120) == {}
