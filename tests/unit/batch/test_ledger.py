"""The ledger keeps every record that was committed, whenever the process is killed."""

import fcntl
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch.atomic_files import Busy
from engine.batch.ledger import (
    Ledger,
    ShardWriter,
    encode,
    scan_shard,
    shard_file,
    shard_path,
    shards_dir,
)
from engine.batch.ledger import ledger as ledger_class
from engine.request import Completion, RequestError

BAD_LINE = RequestError("invalid_json", "bad line")


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Skip fsync: no test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def completion(index: int, text: str = "", name: str | int | None = None) -> Completion:
    return Completion(
        index=index,
        id=f"r{index}" if name is None else name,
        text=text or f"text {index}",
        token_ids=[index],
        finish_reason="length",
        prompt_tokens=1,
        completion_tokens=1,
    )


def failure(index: int) -> Completion:
    return Completion.failure(index, f"r{index}", BAD_LINE, line=index + 1)


def indices(content: bytes) -> list[int]:
    return [index for index, _, _ in scan_shard(io.BytesIO(content))]


def open_ledger(tmp_path: Path, num_data: int = 2) -> Ledger:
    ledger = Ledger(tmp_path / "out.jsonl")
    if not (ledger.directory / "manifest.json").exists():
        ledger.start_over({"job": 1})
    ledger.create_shards(num_data)
    return ledger


def append(ledger: Ledger, data_rank: int, *numbers: int) -> None:
    writer = ShardWriter(ledger.directory, data_rank)
    writer.append(map(completion, numbers))
    writer.close()


def test_a_line_of_a_shard_holds_the_record_byte_for_byte():
    line = encode(completion(7, text="é\n"))
    ((index, offset, length),) = scan_shard(io.BytesIO(line))
    assert index == 7 and line.endswith(b"}\n") and line.count(b"\n") == 1
    assert json.loads(line[offset : offset + length]) == completion(7, text="é\n").record()
    assert json.loads(line)["index"] == 7


def test_text_that_has_no_utf8_is_kept_as_an_escape():
    line = encode(completion(0, name="\ud800", text="é"))
    assert json.loads(line)["record"]["id"] == "\ud800"


def test_a_shard_torn_at_any_byte_keeps_every_whole_record_and_nothing_else():
    lines = [encode(completion(index, text="x}\n{" * index)) for index in range(3)]
    content = b"".join(lines)
    ends = np.cumsum([len(line) for line in lines])
    for cut in range(len(content) + 1):
        assert indices(content[:cut]) == list(range(int((ends <= cut).sum())))


def test_a_torn_shard_is_truncated_at_its_last_line_end_and_continued(tmp_path):
    lines = [encode(completion(index)) for index in range(3)]
    content = b"".join(lines)
    ledger = open_ledger(tmp_path, num_data=1)
    path = shard_path(ledger.directory, 0)
    for cut in [0, 1, *range(len(content) - len(lines[2]) - 1, len(content) + 1)]:
        path.write_bytes(content[:cut])
        ledger.create_shards(1)
        whole = indices(content[:cut])
        append(ledger, 0, *(index for index in (2, 1, 0) if index not in whole))
        assert sorted(indices(path.read_bytes())) == [0, 1, 2], f"torn at byte {cut}"
    ledger.close()


def test_a_torn_tail_longer_than_a_chunk_is_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "CHUNK", 16)
    ledger = open_ledger(tmp_path, num_data=1)
    path = shard_path(ledger.directory, 0)
    line = encode(completion(0))
    for torn in (b"x" * 15, b"x" * 16, b"x" * 1000):
        path.write_bytes(line + torn)
        ledger.create_shards(1)
        assert path.read_bytes() == line
    path.write_bytes(b"x" * 100)
    ledger.create_shards(1)
    assert path.read_bytes() == b""
    ledger.close()


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_byte_costs_at_most_the_records_it_touches(place, value):
    lines = [encode(completion(index)) for index in range(3)]
    content = bytearray(b"".join(lines))
    place %= len(content)
    content[place] = value
    ends = np.cumsum([len(line) for line in lines]).tolist()
    hit = next(index for index, end in enumerate(ends) if place < end)
    found = indices(bytes(content))
    assert set(found) <= {0, 1, 2} and len(found) == len(set(found))
    # A damaged line end also takes the line that follows.
    assert {0, 1, 2} - {hit, hit + (place == ends[hit] - 1)} <= set(found)
    for index, offset, length in scan_shard(io.BytesIO(bytes(content))):
        assert json.loads(content[offset : offset + length]) == completion(index).record()


def test_zeros_where_a_block_never_reached_the_disk_are_no_record():
    line = encode(completion(5, text="y" * 300))
    assert indices(line[:100] + b"\0" * 50 + line[150:]) == []


def test_the_worked_example_of_the_module(tmp_path):
    ledger = open_ledger(tmp_path)
    append(ledger, 0, 0, 2, 5)
    append(ledger, 1, 1, 3)
    with shard_path(ledger.directory, 1).open("ab") as file:
        file.write(encode(completion(4))[:-1])
    assert ledger.done(6).tolist() == [True, True, True, True, False, True]
    ledger.close()
    ledger = open_ledger(tmp_path, num_data=3)
    append(ledger, 2, 4)
    assert ledger.merge(range(6)) == 0
    records = [json.loads(line) for line in ledger.output.read_text().splitlines()]
    assert records == [completion(index).record() for index in range(6)]
    ledger.remove()
    ledger.close()
    assert not ledger.directory.exists()


def test_merge_counts_errors_and_not_texts_that_mention_them(tmp_path):
    ledger = open_ledger(tmp_path, num_data=1)
    writer = ShardWriter(ledger.directory, 0)
    texts = ['"finish_reason": "error"', '{"finish_reason": "error"}']
    writer.append([failure(1), *(completion(i, t) for i, t in zip((0, 2), texts, strict=True))])
    writer.close()
    assert ledger.merge(range(3)) == 1
    ledger.close()


def test_merge_refuses_while_a_record_is_missing_and_leaves_no_output(tmp_path):
    ledger = open_ledger(tmp_path)
    append(ledger, 0, 0, 2)
    with pytest.raises(ValueError, match="1 of 3 records are missing, first that of request 1"):
        ledger.merge(range(3))
    assert not ledger.output.exists()
    ledger.close()


def test_a_merge_that_fails_keeps_the_old_output_and_the_ledger(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    append(ledger, 0, 0, 1)
    ledger.output.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ledger.merge(range(2))
    monkeypatch.undo()
    assert ledger.output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.parts"]
    assert ledger.merge(range(2)) == 0 and ledger.output.read_text() != "old"
    ledger.close()


def test_merging_twice_gives_the_same_bytes(tmp_path):
    ledger = open_ledger(tmp_path)
    append(ledger, 0, 1)
    append(ledger, 1, 0, 1)
    ledger.merge(range(2))
    first = ledger.output.read_bytes()
    ledger.merge(range(2))
    assert ledger.output.read_bytes() == first and first.count(b"\n") == 2
    ledger.close()


def test_an_empty_job_merges_to_an_empty_output(tmp_path):
    ledger = open_ledger(tmp_path)
    assert ledger.merge(range(0)) == 0
    assert ledger.output.read_bytes() == b""
    ledger.close()


def test_records_that_finish_together_are_synced_once_and_before_append_returns(
    tmp_path, monkeypatch
):
    ledger = open_ledger(tmp_path, num_data=1)
    writer = ShardWriter(ledger.directory, 0)
    synced: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    writer.append(map(completion, range(5)))
    assert synced == [writer.path.stat().st_size] and len(indices(writer.path.read_bytes())) == 5
    writer.close()
    ledger.close()


def test_a_write_that_takes_only_some_bytes_is_continued(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path, num_data=1)
    writer = ShardWriter(ledger.directory, 0)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    writer.append(map(completion, range(3)))
    assert indices(writer.path.read_bytes()) == [0, 1, 2]
    writer.close()
    ledger.close()


def test_a_second_run_of_the_same_output_is_refused_until_the_first_ends(tmp_path):
    first = Ledger(tmp_path / "out.jsonl")
    with pytest.raises(Busy, match="the job is being run by another process"):
        Ledger(tmp_path / "out.jsonl")
    Ledger(tmp_path / "other.jsonl").close()
    first.close()
    Ledger(tmp_path / "out.jsonl").close()


def test_a_shard_that_a_rank_of_a_dead_run_still_writes_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "_SHARD_LOCK_TIMEOUT_S", 0.1)
    ledger = open_ledger(tmp_path, num_data=1)
    orphan = ShardWriter(ledger.directory, 0)
    with pytest.raises(Busy, match="part-00000.jsonl: is being written by another process"):
        ledger.create_shards(1)
    with pytest.raises(Busy, match="is being written"):
        ShardWriter(ledger.directory, 0)
    orphan.close()
    ledger.create_shards(1)
    ledger.close()


def test_a_lock_file_that_its_last_holder_removed_does_not_count(tmp_path, monkeypatch):
    """A run that ends removes the lock between another's open and flock."""
    output = tmp_path / "out.jsonl"
    real, removed = fcntl.flock, []

    def flock(fd: int, mode: int) -> None:
        real(fd, mode)
        if not removed:
            removed.append((shards_dir(output) / "lock").unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    ledger = Ledger(output)
    monkeypatch.undo()
    with pytest.raises(Busy):
        Ledger(output)
    ledger.close()


def test_an_output_in_no_directory_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Ledger(tmp_path / "missing" / "out.jsonl")


def test_start_over_discards_records_before_it_writes_the_manifest(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    append(ledger, 0, 0, 1)
    seen = []
    monkeypatch.setattr(ledger_class, "write_json", lambda path, value: seen.append(ledger.count()))
    ledger.start_over({"job": 2})
    assert seen == [0]
    ledger.close()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_random_kills_on_changing_numbers_of_ranks_lose_and_double_nothing(tmp_path_factory, seed):
    chance = random.Random(seed)
    tmp_path = tmp_path_factory.mktemp("kills")
    num_lines = chance.randint(0, 25)
    committed: set[int] = set()
    while True:
        num_data = chance.randint(1, 4)
        ledger = open_ledger(tmp_path, num_data)
        done_n = ledger.done(num_lines)
        assert set(np.flatnonzero(done_n).tolist()) >= committed, "a committed record was lost"
        todo = np.flatnonzero(~done_n).tolist()
        chance.shuffle(todo)
        committed = set(np.flatnonzero(done_n).tolist())
        killed = False
        for index in todo:
            data_rank = chance.randrange(num_data)
            if chance.random() < 0.15:  # killed inside a write: some bytes reached the disk
                line = encode(completion(index))
                with shard_path(ledger.directory, data_rank).open("ab") as file:
                    file.write(line[: chance.randint(0, len(line))])
                killed = True
                break
            append(ledger, data_rank, index)
            committed.add(index)
        ledger.close()
        if not killed:
            break
    ledger = open_ledger(tmp_path, 1)
    ledger.merge(range(num_lines))
    ledger.close()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert records == [completion(index).record() for index in range(num_lines)]
