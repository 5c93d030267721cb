"""What all tests share: no network, one thread, gpu tests on a GPU, else Triton's interpreter."""

import os

import pytest

# Before torch is imported, and inherited by the ranks that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings

# Before anything imports triton, which decides it for each kernel when the kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in each run, however slow the machine: a failure here is a failure everywhere.
settings.register_profile("lockstep", deadline=None, derandomize=True, database=None)
settings.load_profile("lockstep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
