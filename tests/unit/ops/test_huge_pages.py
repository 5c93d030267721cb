"""prefer_huge_pages: harmless wherever it does not apply, and leaves the contents alone.

Run: python -m pytest tests/unit/ops/test_huge_pages.py
"""

import sys
from pathlib import Path

import pytest
import torch

from engine.ops.huge_pages import prefer_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_small_tensors_and_other_devices_are_left_alone():
    assert not prefer_huge_pages(torch.zeros(1000))
    assert not prefer_huge_pages(torch.empty(0))
    assert not prefer_huge_pages(torch.empty(10_000_000, device="meta"))


def test_the_contents_do_not_change():
    tensor = torch.arange(3_000_000.0)
    prefer_huge_pages(tensor)
    assert torch.equal(tensor, torch.arange(3_000_000.0))


@pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or not SETTING.exists()
    or "[never]" in SETTING.read_text(),
    reason="this system offers no transparent huge pages",
)
def test_a_large_cpu_tensor_is_accepted():
    assert prefer_huge_pages(torch.empty(4_000_000))
