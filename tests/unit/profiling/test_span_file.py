"""Span files: what is written can be read back, on one clock, within the bound.

Run: pytest tests/unit/profiling/test_span_file.py
"""

import errno
import json
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.profiling.phase_clock import Phase, Spans
from engine.profiling.span_file import SpanFileHeader, SpanWriter, check_folder
from tests.helpers.profiles import MS, make_spans

OFFSET = 5_000_000_000


def header(rank: int = 3) -> SpanFileHeader:
    return SpanFileHeader(
        rank=rank,
        host="h1",
        world_size=4,
        group=[2, 3],
        clock_offset_ns=OFFSET,
        clock_error_ns=800,
        num_layers=1,
        num_experts=4,
        own_experts={0: [2, 3]},
        num_homes={0: 1},
        num_copies={0: 1},
        policy="token_drop",
    )


def step_spans(start: float = 10) -> Spans:
    return make_spans(
        (Phase.EXPERTS, 0, start, start + 3, 40), (Phase.COMBINE, 0, start + 3, start + 5, 8)
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_written_with_aligned_start_offsets_waiting_and_loads(tmp_path):
    writer = SpanWriter(tmp_path, header(), 1 << 20)
    arrivals = np.array([[14 * MS], [13 * MS]])
    loads = {0: (np.array([1, 2, 3, 4]), [2, 3])}
    writer.write(7, step_spans(), arrivals, OFFSET, (12, 1), loads)
    writer.write(8, step_spans(20), None, OFFSET, (0, 2), {})
    writer.close()
    first, step, unknown = read(tmp_path / "spans.rank00003.jsonl")
    assert (first["format"], first["version"], first["rank"]) == ("lockstep-spans", 2, 3)
    assert first["phases"][Phase.EXPERTS] == "experts" and first["group"] == [2, 3]
    assert step["start_ns"] == 10 * MS + OFFSET and (step["prefill"], step["decode"]) == (12, 1)
    assert step["spans"] == [
        [Phase.EXPERTS, 0, 0, 3 * MS, 40, 0, 0],
        [Phase.COMBINE, 0, 3 * MS, 2 * MS, 8, 1000, 1 * MS],
    ]
    assert step["before"] == {"0": [1, 2, 3, 4]} and step["after"] == {"0": [2, 3]}
    assert [span[-1] for span in unknown["spans"]] == [-1, -1], "no arrivals are known"


def test_the_keys_of_a_span_file_are_those_that_its_readers_know(tmp_path):
    writer = SpanWriter(tmp_path, header(), 1 << 20)
    writer.write(7, step_spans(), None, OFFSET, (12, 1), {})
    writer.close()
    first, step = read(tmp_path / "spans.rank00003.jsonl")
    assert list(first) == (
        "rank host world_size group clock_offset_ns clock_error_ns num_layers num_experts "
        "own_experts num_homes num_copies policy phases format version".split()
    )
    assert list(step) == "step start_ns prefill decode spans before after".split()
    assert first["phases"] == (
        "other attention gate consensus plan dispatch experts combine control tensor graph".split()
    )


def on_disk(folder: Path, writer: SpanWriter) -> int:
    """Bytes of all files, with what the writer still holds."""
    writer._file.flush()
    return sum(path.stat().st_size for path in folder.iterdir())


def steps_in(folder: Path) -> list[int]:
    names = ("spans.rank00003.old.jsonl", "spans.rank00003.jsonl")
    files = [read(folder / name) for name in names if (folder / name).exists()]
    assert all(head["format"] == "lockstep-spans" for head, *_ in files)
    return [line["step"] for _, *lines in files for line in lines]


def test_files_stay_within_the_bound_and_keep_the_newest_steps(tmp_path):
    bound = 20_000
    writer = SpanWriter(tmp_path, header(), bound)
    most = 0
    for step in range(1000):
        writer.write(step, step_spans(10 * step), None, 0, (1, 0), {})
        most = max(most, on_disk(tmp_path, writer))
    writer.close()
    assert bound - 300 < most <= bound, "all of it is used, and not a byte more"
    current = tmp_path / "spans.rank00003.jsonl"
    old = tmp_path / "spans.rank00003.old.jsonl"
    assert max(current.stat().st_size, old.stat().st_size) <= bound // 2
    (head, *_), (again, *_) = read(old), read(current)
    assert head == again
    steps = steps_in(tmp_path)
    assert steps == list(range(steps[0], 1000)), "no step is missing between the two"
    assert len(steps) > 50


@given(st.lists(st.integers(1, 150), min_size=1, max_size=60), st.integers(700, 12_000))
@settings(deadline=None, max_examples=60)
def test_steps_of_any_size_stay_within_the_bound_and_the_newest_that_fits_is_there(sizes, bound):
    with TemporaryDirectory() as name, TemporaryDirectory() as other:
        folder, whole = Path(name), Path(other)
        writer, unbound = SpanWriter(folder, header(), bound), SpanWriter(whole, header(), 1 << 30)
        alone = on_disk(folder, writer)
        fitting: list[int] = []
        for step, num_spans in enumerate(sizes):
            spans = make_spans(*[(Phase.EXPERTS, 0, at, at + 1, 40) for at in range(num_spans)])
            before = on_disk(whole, unbound)
            for each in (writer, unbound):
                each.write(step, spans, None, 0, (1, 0), {})
            assert on_disk(folder, writer) <= bound
            if alone + on_disk(whole, unbound) - before <= bound:
                fitting.append(step)
            found = steps_in(folder)
            assert found == fitting[len(fitting) - len(found) :], "the newest of those that fit"
            assert found or not fitting
        writer.close()
        unbound.close()


def test_a_step_larger_than_half_the_bound_is_written_alone_and_makes_room_for_the_next(tmp_path):
    bound = 6000
    writer = SpanWriter(tmp_path, header(), bound)
    large = make_spans(*[(Phase.EXPERTS, 0, 10 + at, 11 + at, 40) for at in range(165)])
    for step in range(40):
        writer.write(step, step_spans(), None, 0, (1, 0), {})
    writer.write(40, large, None, 0, (1, 0), {})
    assert bound // 2 < on_disk(tmp_path, writer) <= bound and steps_in(tmp_path) == [40]
    assert [path.name for path in tmp_path.iterdir()] == ["spans.rank00003.jsonl"]
    for step in range(41, 60):
        writer.write(step, step_spans(), None, 0, (1, 0), {})
        assert on_disk(tmp_path, writer) <= bound and steps_in(tmp_path)[-1] == step
    writer.close()


def test_a_new_run_leaves_nothing_of_the_last_one(tmp_path):
    for steps in (1000, 1):
        writer = SpanWriter(tmp_path, header(), 20_000)
        for step in range(steps):
            writer.write(step, step_spans(), None, 0, (1, 0), {})
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["spans.rank00003.jsonl"]
    assert len(read(tmp_path / "spans.rank00003.jsonl")) == 2


def test_a_folder_is_checked_and_what_is_in_it_stays(tmp_path):
    folder = tmp_path / "a" / "b"
    check_folder(folder, 3)
    assert list(folder.iterdir()) == []
    earlier = folder / "spans.rank00003.jsonl"
    earlier.write_text("earlier")
    check_folder(folder, 3)
    assert [path.name for path in folder.iterdir()] == [earlier.name]
    assert earlier.read_text() == "earlier"


@pytest.mark.parametrize("name", ["spans.rank00003.jsonl", "spans.rank00003.old.jsonl"])
def test_a_folder_in_a_span_files_place_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=name):
        check_folder(tmp_path, 3)


def test_a_file_in_the_folders_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError):
            check_folder(folder, 3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_also_where_it_shows_at_the_sync(tmp_path, monkeypatch, code):
    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        check_folder(tmp_path, 3)
    assert caught.value.filename == str(tmp_path), "the same on all ranks"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_syncs_is_no_error(tmp_path, monkeypatch):
    def unknown(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", unknown)
    check_folder(tmp_path, 3)


def test_a_disk_that_fills_up_is_logged_once_and_ends_nothing(tmp_path, caplog):
    writer = SpanWriter(tmp_path, header(), 1 << 20)
    writer._file.close()
    writer._file = open("/dev/full", "w")
    with caplog.at_level(logging.WARNING):
        for step in range(1000):
            writer.write(step, step_spans(), None, OFFSET, (0, 2), {})
        writer.close()
        writer.close()
    (record,) = caplog.records
    assert "No space left on device; the job goes on" in record.getMessage()
