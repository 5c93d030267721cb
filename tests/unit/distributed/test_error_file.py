"""The file that torchrun's summary quotes, as torch reads it."""

import json
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from engine.distributed.error_file import record_error


def failure(path: Path, rank: int = 0):
    return ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(path))


def test_torch_reads_message_and_time_from_the_file(tmp_path):
    path = tmp_path / "error.json"
    before = int(time.time())
    record_error("error: two\nlines", environ={"TORCHELASTIC_ERROR_FILE": str(path)})
    assert before <= failure(path).timestamp <= time.time()
    text = ChildFailedError("infer.py", {0: failure(path)}).format_msg()
    assert "traceback : error: two\n  lines" in text
    assert list(tmp_path.iterdir()) == [path], "no draft is left"


def test_the_first_message_is_kept(tmp_path):
    path = tmp_path / "error.json"
    for message in ("the cause", "what came of it"):
        record_error(message, environ={"TORCHELASTIC_ERROR_FILE": str(path)})
    assert json.loads(path.read_text())["message"]["message"] == "the cause"


def test_a_rank_that_follows_is_not_the_root_cause_though_it_writes_first(tmp_path):
    paths = [tmp_path / "0", tmp_path / "1"]
    for path, follows in zip(paths, (True, False), strict=True):
        record_error(
            f"follows: {follows}",
            follows=follows,
            environ={"TORCHELASTIC_ERROR_FILE": str(path)},
        )
    failures = {rank: failure(path, rank) for rank, path in enumerate(paths)}
    assert ChildFailedError("infer.py", failures).get_first_failure()[0] == 1


@pytest.mark.parametrize("environ", [{}, {"TORCHELASTIC_ERROR_FILE": "/no/such/folder/file"}])
def test_without_torchrun_or_a_place_to_write_nothing_happens(environ):
    record_error("an error", environ=environ)
