"""Records: what building and writing one takes, in our own form and in OpenAI's.

    python tools/bench_records.py
    python tools/bench_records.py --tokens 2000 --records 50

Records of 500 new tokens with log probabilities, appended to a ledger shard 8 at a time, as many
requests of a step finish together. OpenAI's have 5 candidates per token, drawn from the bundled
model's vocabulary. `built` is the record's JSON alone; `written` adds checksum and write, without
the sync, which is the disk's time and one per step. Median of the rounds, in which forms take
turns. The table is followed by one JSON line.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.candidate import REPOSITORY
from bench.environment_record import environment_record
from bench.report import emit, spread, table

HEADER = ["form", "candidates", "bytes per record", "built us", "written us", "least written us"]
_MODEL = REPOSITORY / "configs/checkpoints/tiny_mixtral"
_TOGETHER = 8  # records of one write
_ROUNDS = 9
_FORMS = {"own": 0, "own with candidates": 5, "chat": 5, "completion": 5}


def make_completion(draw: random.Random, form: str, tokens: int, vocab: int, texts: Any) -> Any:
    """Return a completion of random tokens with log probabilities."""
    from engine.request import Completion, Request

    ids = [draw.randrange(vocab) for _ in range(tokens)]
    candidates = None
    if count := _FORMS[form]:
        candidates = [
            [(token, -10 * draw.random()) for token in draw.sample(range(vocab), count)]
            for _ in ids
        ]
    endpoint = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}.get(form)
    return Completion(
        index=draw.randrange(1 << 20),
        id=f"request-{draw.randrange(1 << 20)}",
        text=texts.decode(ids),
        token_ids=ids,
        finish_reason="length",
        prompt_tokens=100,
        completion_tokens=tokens,
        logprobs=[-10 * draw.random() for _ in ids],
        top_logprobs=candidates,
        request=Request(index=0, id=0, prompt_token_ids=[1], endpoint=endpoint),  # type: ignore
    )


def measure(records: int, tokens: int, folder: Path) -> list[dict[str, Any]]:
    """Return a row per form."""
    from transformers import AutoTokenizer

    from engine.batch import ledger
    from engine.batch.records.json_bytes import own_record
    from engine.batch.records.openai_form import OpenAIRecords

    tokenizer = AutoTokenizer.from_pretrained(str(_MODEL))
    openai = OpenAIRecords("0123456789abcdef", 1_700_000_000, "model", tokenizer)
    draw = random.Random(0)
    path = ledger.shard_path(folder, 0)
    path.touch()
    writer = ledger.ShardWriter(folder, 0)
    fsync, os.fsync = os.fsync, lambda fd: None
    rows: dict[str, dict[str, Any]] = {}
    try:
        cases = {
            form: [
                make_completion(draw, form, tokens, len(tokenizer), tokenizer)
                for _ in range(records)
            ]
            for form in _FORMS
        }
        for form in _FORMS:
            rows[form] = {"form": form, "candidates": _FORMS[form], "built": [], "written": []}
        for number in range(_ROUNDS + 1):  # the first fills caches
            for form, completions in cases.items():
                to_record = own_record if form.startswith("own") else openai
                begin = time.perf_counter()
                sizes = [len(to_record(each)) for each in completions]
                built = time.perf_counter()
                writer.to_record = to_record
                for at in range(0, records, _TOGETHER):
                    writer.append(completions[at : at + _TOGETHER])
                written = time.perf_counter()
                os.truncate(path, 0)
                if number:
                    rows[form]["built"].append((built - begin) / records * 1e6)
                    rows[form]["written"].append((written - built) / records * 1e6)
                rows[form]["bytes"] = sum(sizes) / records
    finally:
        os.fsync = fsync
        writer.close()
    return [
        {**row, "built": spread(row["built"]), "written": spread(row["written"])}
        for row in rows.values()
    ]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=_count, default=500, help="new tokens per record")
    parser.add_argument("--records", type=_count, default=200, help="records of a form per round")
    parser.add_argument("--out", type=Path, help="folder for table and JSON line too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.records, options.tokens, Path(folder))
    shown = [
        [
            row["form"],
            row["candidates"],
            row["bytes"],
            row["built"]["median"],
            row["written"]["median"],
            row["written"]["min"],
        ]
        for row in rows
    ]
    config = {"tokens": options.tokens, "records": options.records, "rounds": _ROUNDS}
    packages = environment_record(("orjson", "transformers"))
    payload = {"bench": "records", **packages, "config": config, "rows": rows}
    emit(table(HEADER, shown), payload, options.out, "bench_records")


if __name__ == "__main__":
    main()
