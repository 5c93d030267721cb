"""The GPU kernels compiled for GPUs that are not here: each declared call of kernels/gpu.

The long tests take the compiler 20 seconds per GPU and version of triton, on one core.
"""

from __future__ import annotations

import importlib.util

import compile_kernels
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which Linux alone has"
)


def test_no_number_of_tokens_compiles_a_kernel_again_and_each_kernel_has_a_declared_call():
    run = compile_kernels.python("steady")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.long
def test_every_kernel_compiles_and_none_spills_more_or_is_a_fifth_larger_than_in_the_table():
    record = compile_kernels.compile_all()
    assert compile_kernels.failures(record) == []
    version = compile_kernels.table_version()
    if record["triton"] != version:  # Python 3.10 resolves a version of its own
        pytest.skip(f"the table is of triton {version}, installed is {record['triton']}")
    assert compile_kernels.comparison(record) == [], (
        "meant? python tools/compile_kernels.py --write"
    )


@pytest.mark.long
@pytest.mark.parametrize("version", compile_kernels.OTHERS)
def test_every_kernel_compiles_with_the_oldest_and_the_newest_triton(version):
    folder = compile_kernels.folder_of(version)
    if not folder.exists():
        pytest.skip(f"no {folder}: python tools/compile_kernels.py --install")
    record = compile_kernels.compile_all(folder)
    assert record["triton"] == version
    assert compile_kernels.failures(record) == []
