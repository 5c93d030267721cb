"""tools/compile_kernels.py: what it reports of kernels that grew, are missing or do not compile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import compile_kernels
from gpu_compile import table

ROOT = Path(__file__).resolve().parents[2]


def grown(before: table.Numbers, now: table.Numbers) -> list[str]:
    key, same = ("k", "bf16"), {90: (40, 0, 2048), 100: (40, 0, 2048)}
    return [*table.regressions({key: {80: before, **same}}, {key: {80: now, **same}})]


def entry(**changed: Any) -> dict[str, Any]:
    numbers = {"kernel": "_add_kernel", "registers": 40, "spills": 0, "shared": 0}
    return {"arch": 80, "module": "add", "variant": "bf16", **numbers, **changed}


def test_a_spill_or_a_growth_of_more_than_a_fifth_is_reported_with_the_kernel():
    assert grown((40, 0, 2048), (48, 0, 2457)) == []
    assert grown((40, 0, 2048), (49, 0, 2048)) == ["k (bf16) on sm_80: 49 registers, before 40"]
    assert grown((40, 0, 2048), (40, 4, 2048)) == ["k (bf16) on sm_80: 4 bytes of spills, before 0"]
    assert grown((40, 0, 2048), (40, 0, 2458)) == [
        "k (bf16) on sm_80: 2458 bytes of shared memory, before 2048"
    ]


def test_what_never_limits_a_gpu_may_grow():
    assert grown((8, 0, 0), (32, 0, 1024)) == []


def test_kernels_that_are_new_or_gone_are_reported():
    one = {("old", "bf16"): {80: (1, 0, 0)}}
    two = {("new", "bf16"): {80: (1, 0, 0)}}
    assert [*table.regressions(one, two)] == [
        "new (bf16) is not in the table",
        "old (bf16) is in the table and no longer compiled",
    ]


def test_a_kernel_that_is_launched_twice_is_two_rows_only_if_the_two_differ():
    entries = [entry(), entry(), entry(registers=50)]
    assert table.table_of(entries) == {
        ("add", "bf16"): {80: (40, 0, 0)},
        ("add", "bf16 (2)"): {80: (50, 0, 0)},
    }


def test_launches_that_differ_on_one_gpu_are_two_rows_of_every_gpu():
    numbers = {80: (40, 40), 90: (30, 50)}
    entries = [entry(arch=arch, registers=each) for arch in numbers for each in numbers[arch]]
    assert table.table_of(entries) == {
        ("add", "bf16"): {80: (40, 0, 0), 90: (30, 0, 0)},
        ("add", "bf16 (2)"): {80: (40, 0, 0), 90: (50, 0, 0)},
    }


def test_the_table_is_read_as_it_was_written():
    numbers = {80: (255, 136, 106496), 90: (40, 0, 0), 100: (1, 2, 3)}
    rows = {("attention", "bf16 group 4, head 128"): numbers, ("a", "fp32 256 wide"): numbers}
    assert table.read(table.write(rows, "3.7.1")) == (rows, "3.7.1")


def test_a_kernel_that_fails_is_named_with_its_file_and_gpu():
    record = {"kernels": [entry(error="CompilationError: no")], "missing": []}
    assert compile_kernels.failures(record) == [
        "kernels/gpu/add.py (bf16) on sm_80: CompilationError: no"
    ]


def test_a_kernel_that_no_call_launches_or_that_no_block_has_room_for_is_a_failure():
    assert compile_kernels.failures({"kernels": [], "missing": ["_add_kernel"]}) == [
        "_add_kernel: no call in `variants()` launches it"
    ]
    record = {"kernels": [entry(shared=200_000)], "missing": []}
    assert compile_kernels.failures(record) == [
        "add (bf16) on sm_80: 200000 bytes shared, limit 166912"
    ]


def test_the_table_is_of_the_pinned_triton_and_the_others_are_the_ends_of_the_range():
    version = compile_kernels.table_version()
    constraints = (ROOT / ".ci" / "constraints.txt").read_text()
    assert f"triton=={version} " in constraints
    setup = (ROOT / "setup.py").read_text()
    ranges = set(re.findall(r"\"triton>=(\d+)\.(\d+),<(\d+)\.(\d+)", setup))
    oldest, newest = (compile_kernels.OTHERS[i].split(".") for i in (0, 1))
    assert ranges == {(*oldest[:2], newest[0], str(int(newest[1]) + 1))}
