"""engine/distributed/errors.py: a failed allocation is an error of the setting that sizes it."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from engine.distributed.errors import memory_in_words


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
        OverflowError("Python int too large to convert to C ssize_t"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_an_allocation_that_fails_names_the_setting(error):
    with (
        pytest.raises(ValueError, match=r"^a\.b = 3: lower it \(") as caught,
        memory_in_words("a.b = 3: lower it"),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_torchs_own_failures_are_recognised():
    for size in (2**62, 2**59):
        with pytest.raises(ValueError, match="too large"), memory_in_words("too large"):
            torch.empty(size, dtype=torch.float64)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.EIO, "I/O")])
def test_other_errors_are_kept(error):
    with pytest.raises(type(error)) as caught, memory_in_words("a.b = 3"):
        raise error
    assert caught.value is error
