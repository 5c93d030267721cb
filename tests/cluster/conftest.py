"""Lets the tests of this folder import what tools/ has for faults and clusters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
