"""A job in OpenAI's form on two ranks: every line once in the pair of files, whatever is killed.

python -m pytest tests/distributed/test_openai_job.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from engine.batch.ledger import shards_dir
from engine.batch.records.job_format import error_file
from tests.helpers.batch_case import committed, make_batch_job, records, report, run
from tests.helpers.ranks import RanksFailed

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
# Lines of this many tokens do not fit into a cache of 4 blocks of 16 tokens.
LONG = {"prompt": "x" * 64, "max_tokens": 8}


def openai_lines() -> list[dict[str, Any]]:
    bodies: list[tuple[str, dict[str, Any]]] = []
    for number in range(6):
        bodies += [
            (TEXT, {"prompt": f"number {number}", "max_tokens": 2 + 3 * number}),
            (TEXT, {"prompt": ["ab", [5, 6]], "n": 2, "temperature": 1.0, "max_tokens": 3}),
            (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}),
        ]
    bodies[2:2] = [(TEXT, {"prompt": "a", "max_tokns": 3}), (TEXT, LONG)]
    bodies[9:9] = [(CHAT, {"messages": MESSAGES, "stream": True}), (TEXT, LONG)]
    lines = [
        {"custom_id": f"r{place}", "method": "POST", "url": url, "body": body}
        for place, (url, body) in enumerate(bodies)
    ]
    lines[7]["custom_id"] = "r0"
    return lines


LINES = openai_lines()
REFUSED = [2, 7, 9]
TOO_LONG = [3, 10]


def command(job: Path, output: Path, *more: str) -> list[str]:
    files = ["--input", str(job / "openai.jsonl"), "--output", str(output)]
    return ["--config", str(job / "config.yaml"), *files, *more]


def answers(output: Path) -> dict[int, Any]:
    """Return what each line got; check that it is in one of the files, once and in input order."""
    errors = error_file(output)
    good, bad = records(output), records(errors) if errors.exists() else []
    found: dict[int, Any] = {}
    for is_good, each in ((True, good), (False, bad)):
        places = [int(record["id"][-8:], 16) for record in each]
        assert places == sorted(places)
        for place, record in zip(places, each, strict=True):
            assert place not in found, "twice"
            assert record["custom_id"] == LINES[place]["custom_id"] and record["error"] is None
            response = record["response"]
            assert response["status_code"] == (200 if is_good else 400)
            found[place] = parse(response["body"])
    assert sorted(found) == list(range(len(LINES)))
    return found


def parse(body: dict[str, Any]) -> Any:
    """Return a body as the official package has it, without what may differ between runs."""
    if "error" in body:
        return ErrorObject.model_validate(body["error"], strict=True).code
    model = ChatCompletion if body["object"] == "chat.completion" else Completion
    parsed = model.model_validate(body, strict=True)
    return [choice.model_dump(exclude={"logprobs"}) for choice in parsed.choices]


def killed(rank: int, write: int, event: str, argv: list[str]) -> None:
    with pytest.raises(RanksFailed, match=f"rank {rank}: exited without a result, exit code -9"):
        run(2, argv, (rank, write, event))


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("openai")
    make_batch_job(path)
    (path / "openai.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_killed_resumed_and_retried_every_line_is_once_in_the_pair_of_files(job, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(1, command(job, whole))[0][0] == 0
    expected = answers(whole)
    codes = {place: code for place, code in expected.items() if isinstance(code, str)}
    assert list(codes) == REFUSED
    assert list(codes.values()) == ["unknown_setting", "duplicate_id", "unsupported_setting"]

    # The cache is too small for two lines; rank 1 is killed; one rank finishes the job.
    small = command(job, output, "--set", "scheduler.kv_cache_blocks=4")
    killed(1, 3, "kill inside", small)
    done = committed(output, 2)
    assert 0 < len(done) < len(LINES)
    assert not output.exists() and not error_file(output).exists()
    assert [code for code, _, _ in run(1, small)] == [0]
    assert report(output)["resumed"] == len(done)
    first = answers(output)
    exceeded = dict.fromkeys(TOO_LONG, "kv_cache_exceeded")
    assert first == expected | exceeded

    # With room they succeed, on two ranks after rank 0 was killed, and change files.
    both = output.read_bytes(), error_file(output).read_bytes()
    again = command(job, output, "--retry-errors")
    killed(0, 1, "kill after", again)
    assert (output.read_bytes(), error_file(output).read_bytes()) == both
    assert [code for code, _, _ in run(2, command(job, output))] == [0, 0]
    assert answers(output) == expected
    assert report(output)["errors"] == len(REFUSED)
    old, new = set(both[0].splitlines()), set(output.read_bytes().splitlines())
    assert old < new and len(new - old) == len(TOO_LONG), "the others are as they were"
    assert not shards_dir(output).exists()
