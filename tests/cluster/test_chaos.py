"""A short soak: one fault of every kind in a small job, whose output none of them may change.

python -m pytest tests/cluster/test_chaos.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from chaos.faults import KINDS
from chaos.places import why_no_network

SOAK = Path(__file__).resolve().parents[2] / "tools" / "soak.py"
NUM_REQUESTS = 200


def test_no_kind_of_fault_changes_the_output_of_a_job():
    kinds = set(KINDS)
    if why := why_no_network():
        print(f"without slow_link: {why}")
        kinds.remove("slow_link")
    done = subprocess.run(
        [sys.executable, str(SOAK), "--seed", "1", "--ranks", "2"]
        + ["--faults", str(len(kinds)), "--requests", str(NUM_REQUESTS)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert {row["kind"] for row in record["kinds"] if row["injected"]} == kinds
    assert record["jobs"] > 0 and record["records"] == record["jobs"] * NUM_REQUESTS
    assert (record["lost"], record["doubled"], record["differing"]) == (0, 0, 0)
    assert record["in_order"] and not record["problems"]
