"""Free memory is the smallest of the host's and what each cgroup leaves, up to the root."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from engine.config import SchedulerConfig
from engine.generation import memory
from engine.generation.host_memory import FreeMemory, free_memory

GIB = 1 << 30
HOST = 64 * GIB
UNLIMITED = 9223372036854771712  # what version 1 shows where there is no limit


class Host:
    """A made-up host: /proc and the mounted cgroups, as files."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        (self.proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {HOST // 1024} kB\n")

    def process(self, *lines: str, mounts: tuple[str, ...] = ()) -> None:
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))
        if mounts:
            rows = (f"30 23 0:26 {each}\n" for each in mounts)
            (self.proc / "self/mountinfo").write_text("".join(rows))

    def v2(self, path: str, limit: object, used: int, stat: str = "", high: object = "max") -> None:
        self._write(path, {"max": limit, "high": high, "current": used, "stat": stat})

    def v1(self, path: str, limit: object, used: int, stat: str = "") -> None:
        self._write(path, {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat})

    def _write(self, path: str, files: dict[str, object]) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / f"memory.{name}").write_text(f"{value}\n")

    def free(self) -> FreeMemory:
        return free_memory(self.proc, self.cgroups)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_without_cgroups_the_hosts_memory_is_free(host):
    assert host.free() == FreeMemory(HOST)
    host.process("0::/init.scope")
    assert host.free() == FreeMemory(HOST)


def test_version_2_leaves_its_limit_minus_what_is_used(host):
    host.process("0::/pod/box")
    host.v2("pod/box", 8 * GIB, 3 * GIB)
    limit = str(host.cgroups / "pod/box/memory.max")
    assert host.free() == FreeMemory(5 * GIB, limit)


def test_every_ancestor_counts_and_max_is_no_limit(host):
    host.process("0::/slice/pod/box")
    host.v2("slice/pod/box", "max", 3 * GIB)
    host.v2("slice/pod", 16 * GIB, 12 * GIB)
    host.v2("slice", 40 * GIB, 20 * GIB)
    assert host.free().num_bytes == 4 * GIB
    host.v2("slice", 40 * GIB, 38 * GIB)
    assert host.free().num_bytes == 2 * GIB


def test_the_limit_that_slows_a_process_down_counts_like_the_one_that_kills(host):
    host.process("0::/box")
    host.v2("box", "max", 3 * GIB, high=7 * GIB)
    assert host.free() == FreeMemory(4 * GIB, str(host.cgroups / "box/memory.high"))


def test_a_limit_above_the_hosts_memory_changes_nothing(host):
    host.process("0::/box")
    host.v2("box", 1024 * GIB, GIB)
    assert host.free() == FreeMemory(HOST)


def test_page_cache_is_free_and_memory_in_tmpfs_is_not(host):
    host.process("0::/box")
    host.v2("box", 8 * GIB, 7 * GIB, f"file {6 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}")
    assert host.free().num_bytes == 5 * GIB


def test_a_cgroup_over_its_limit_leaves_nothing(host):
    host.process("0::/box")
    host.v2("box", 2 * GIB, 3 * GIB)
    assert host.free().num_bytes == 0


def test_version_1_has_its_own_tree(host):
    host.process("9:name=systemd:/x", "4:cpu,memory:/job/step", "0::/other")
    host.v1("memory/job/step", UNLIMITED, 3 * GIB)
    host.v1("memory/job", 8 * GIB, 5 * GIB, f"total_inactive_file {GIB}\ninactive_file 0")
    host.v1("memory", UNLIMITED, 30 * GIB)
    assert host.free().num_bytes == 4 * GIB


def test_version_1_knows_limits_of_ancestors_that_are_not_visible(host):
    host.process("4:memory:/")
    host.v1("memory", UNLIMITED, 3 * GIB, f"hierarchical_memory_limit {8 * GIB}")
    assert host.free().num_bytes == 5 * GIB


@pytest.mark.parametrize("path", ["/kubepods/pod1/box", "/../box", "/"])
def test_a_container_that_sees_only_its_own_cgroup_is_limited_by_it(host, path):
    host.process(f"0::{path}")
    host.v2(".", 8 * GIB, 3 * GIB)
    assert host.free().num_bytes == 5 * GIB


def test_cgroups_are_found_where_they_are_mounted(host):
    elsewhere = host.cgroups / "my mount"
    v1 = f"/box {elsewhere} rw - cgroup cgroup rw,memory".replace("my mount", r"my\040mount")
    host.process(
        "4:memory:/box/inner",
        "0::/box",
        mounts=("/ / rw shared:1 - ext4 /dev/sda rw", v1, "/ /nowhere rw - cgroup2 cgroup rw"),
    )
    host.v1("my mount/inner", UNLIMITED, GIB)
    host.v1("my mount", 4 * GIB, GIB)
    assert host.free().num_bytes == 3 * GIB


def test_files_that_cannot_be_read_or_hold_no_number_are_no_limit(host):
    host.process("0::/box", "nonsense", "", "4:memory")
    host.v2("box", "lots", 3 * GIB, "inactive_file many\n\nx")
    assert host.free() == FreeMemory(HOST)


def test_the_kv_cache_fits_the_cgroup_and_the_refusal_names_its_limit(monkeypatch):
    def blocks(free: FreeMemory, copy_bytes: int = 0) -> int:
        monkeypatch.setattr(memory, "free_memory", lambda: free)
        return memory.num_kv_blocks(
            SchedulerConfig(max_sequences=1024, block_size=16),
            bytes_per_block=1 << 20,
            max_model_len=4096,
            reserve_bytes=0,
            device=torch.device("cpu"),
            local_world_size=2,
            copy_bytes=copy_bytes,
        )

    assert blocks(FreeMemory(8 * GIB)) == 1024
    assert blocks(FreeMemory(8 * GIB), 3 * GIB) == 1024, "what is free is read after the copies"
    with pytest.raises(ValueError, match=r"copies of experts have taken 3\.00 GiB .* fewer copies"):
        blocks(FreeMemory(1 << 20), 3 * GIB)
    with pytest.raises(ValueError, match=r"on cpu \(limited by /sys/box/memory.max\): 0.00 GiB"):
        blocks(FreeMemory(1 << 20, "/sys/box/memory.max"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"kv_cache_gib": 5.0},
            "scheduler.kv_cache_gib: 5.0 does not fit: the KV cache would take 5.00 GiB and 4.00 "
            "GiB are free on cpu for each of the 2 ranks here (limited by /box/memory.max); give "
            "at most 4.00, or null",
        ),
        ({"kv_cache_gib": 1.7e308}, "scheduler.kv_cache_gib: 1.7e+308 does not fit"),
        ({"kv_cache_blocks": 10**299}, "would take 9.31e+290 GiB and 4.00 GiB are free"),
        (
            {"kv_cache_blocks": 4097},
            "scheduler.kv_cache_blocks: 4097 does not fit: the KV cache would take 4.00 GiB and "
            "4.00 GiB are free on cpu for each of the 2 ranks here (limited by /box/memory.max); "
            "give at most 4096",
        ),
    ],
)
def test_a_kv_cache_larger_than_what_is_free_is_refused_with_what_is(monkeypatch, settings, text):
    free = FreeMemory(8 * GIB, "/box/memory.max")
    monkeypatch.setattr(memory, "free_memory", lambda: free)

    def blocks(**settings) -> int:
        return memory.num_kv_blocks(
            SchedulerConfig(**settings),
            bytes_per_block=1 << 20,
            max_model_len=4096,
            reserve_bytes=0,
            device=torch.device("cpu"),
            local_world_size=2,
        )

    with pytest.raises(ValueError) as caught:
        blocks(**settings)
    assert text in str(caught.value)
    assert (blocks(kv_cache_gib=4.0), blocks(kv_cache_blocks=4096)) == (4096, 4096)


def test_recurrent_states_take_their_memory_before_the_kv_cache(monkeypatch):
    free = FreeMemory(8 * GIB, "/box/memory.max")
    monkeypatch.setattr(memory, "free_memory", lambda: free)

    def blocks(state_mib: int, **settings) -> int:
        return memory.num_kv_blocks(
            SchedulerConfig(**settings),
            bytes_per_block=1 << 20,
            max_model_len=4096,
            reserve_bytes=0,
            device=torch.device("cpu"),
            local_world_size=2,
            state_bytes=state_mib << 20,
        )

    # A quarter of 8 GiB for two ranks is 1,024 MiB, and all of it 4,096 MiB per rank.
    assert (blocks(0), blocks(8), blocks(8, max_sequences=100)) == (1024, 512, 224)
    assert blocks(8, max_batch_tokens=20) == 864, "no more sequences run than a step has tokens"
    assert blocks(8, kv_cache_blocks=3584) == 3584 and blocks(8, kv_cache_gib=3.5) == 3584
    for settings, text in (
        (
            {"max_sequences": 128},
            "scheduler.max_sequences: 128 does not fit: the recurrent states of 128 sequences "
            "would take 1.00 GiB, and 1.00 GiB are free for them and the KV cache on cpu (limited "
            "by /box/memory.max); give at most 127, or use more ranks",
        ),
        (
            {"max_sequences": 512, "kv_cache_blocks": 1},
            "scheduler.max_sequences: 512 does not fit: the recurrent states of "
            "512 sequences would take 4.00 GiB, and 4.00 GiB are free for them and the KV cache on "
            "cpu for each of the 2 ranks here (limited by /box/memory.max); give at most 511",
        ),
        (
            {"kv_cache_blocks": 3585},
            "scheduler.kv_cache_blocks: 3585 does not fit: the KV cache would take 3.50 GiB beside "
            "0.50 GiB of recurrent states and 4.00 GiB are free",
        ),
        ({"kv_cache_gib": 3.6}, "give at most 3.50, or null"),
    ):
        with pytest.raises(ValueError) as caught:
            blocks(8, **settings)
        assert text in str(caught.value)
    with pytest.raises(
        ValueError, match=r"^scheduler\.max_sequences: 64 .* cpu .*; use more ranks"
    ):
        blocks(1024)
    free = FreeMemory(1 << 20)
    with pytest.raises(ValueError, match=r"^scheduler\.kv_cache_gib: no memory is left"):
        blocks(8)


def test_a_real_limit_of_this_machine_is_seen(tmp_path):
    tree = Path("/sys/fs/cgroup/memory")
    if not tree.is_dir():
        tree = Path("/sys/fs/cgroup")
    own = next(
        (
            line.rpartition(":")[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if ":memory:" in line or line.startswith("0::")
        ),
        "/",
    )
    box = tree / own.lstrip("/") / f"lockstep-{uuid.uuid4().hex[:8]}"
    limit = next(
        (
            name
            for name in ("memory.limit_in_bytes", "memory.max")
            if (tree / own.lstrip("/") / name).exists()
        ),
        "memory.max",
    )
    try:
        box.mkdir()
        (box / limit).write_text(str(GIB))
    except OSError as error:
        box.exists() and box.rmdir()
        pytest.skip(f"cannot make a cgroup with a memory limit: {error}")
    program = (
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from engine.generation.host_memory import free_memory\n"
        "print(free_memory().num_bytes)\n"
    )
    try:
        run = subprocess.run(
            [sys.executable, "-c", program, str(box)],
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert 0 < int(run.stdout) <= GIB
    finally:
        box.rmdir()
