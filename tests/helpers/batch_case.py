"""A batch job for tests: a small model, an input of good and bad lines, ranks that run infer.py.

A trap kills or disturbs a rank at an exact moment, in its n-th write to the ledger, so that the
records that must be done are known.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from engine.batch.ledger import scan_shard, shard_path, shards_dir
from tests.helpers.ranks import run_ranks

CONTEXT = 96
NUM_GOOD = 24


def make_batch_job(path: Path) -> None:
    """Write a small random model, its config and an input of good and bad lines."""
    make_model(path / "model")
    (path / "config.yaml").write_text(
        f"model: {{path: {path / 'model'}}}\n"
        "scheduler: {max_sequences: 3}\n"
        "sampling: {max_new_tokens: 12, ignore_eos: true}\n"
        "runtime: {device: cpu, timeout_s: 30}\n"
    )
    (path / "in.jsonl").write_text("\n".join(LINES) + "\n")


def make_model(path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: place for place, name in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    MixtralForCausalLM(config).save_pretrained(path)


def good_lines() -> list[str]:
    chance = random.Random(0)
    lines = []
    for number in range(NUM_GOOD - 3):
        text = "".join(chance.choices("abcdefgh .", k=chance.randint(1, 50)))
        # Lengths that differ, so that requests finish a few at a time.
        own = {"max_new_tokens": 2 + 5 * (number % 4), "answer": "the user's own"}
        lines.append(json.dumps({"id": f"r{number}", "prompt": text} | own))
    message = {"role": "user", "content": "hi"}
    chat = {"messages": [message], "max_tokens": 5, "logprobs": True}
    lines += [
        json.dumps({"id": 7, "prompt_token_ids": [5, 6, 7], "prompt_logprobs": True}),
        json.dumps({"id": "m", "messages": [message], "temperature": 1.5, "seed": 3}),
        json.dumps({"id": "o", **chat}),
    ]
    return lines


GOOD = good_lines()
BAD = [
    '{"id": "r0", "prompt": "again"}',
    '{"id": "broken", "prompt": "no end',
    json.dumps({"id": "long", "prompt": "x" * 200}),
    '{"prompt": "no id"}',
]
# Line numbers from 1: a blank line on 2 and bad lines on 4, 6, 8 and 10.
LINES = [GOOD[0], "", GOOD[1], BAD[0], GOOD[2], BAD[1], GOOD[3], BAD[2], GOOD[4], BAD[3], *GOOD[5:]]
IDS = ["r0", "r1", "r0", "r2", "broken", "r3", "long", "r4", None]
IDS += [f"r{number}" for number in range(5, NUM_GOOD - 3)] + [7, "m", "o"]
ALL = len(IDS)


def infer(rank: int, argv: list[str], trap: Any = None) -> tuple[int, str, str]:
    """Run launch/infer.py in this rank; return its exit code and what it printed.

    trap: (rank, number of a write to the ledger, what happens in it).
    """
    from launch import infer as script

    if trap is not None and trap[0] == rank:
        set_trap(*trap[1:])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main(argv)
    return code, out.getvalue(), err.getvalue()


def infer_each(rank: int, argvs: list[list[str]]) -> list[tuple[int, str, str]]:
    """Run several command lines, one after the other, each as if in a process of its own."""
    import torch.distributed as dist

    outcomes = []
    for argv in argvs:
        outcomes.append(infer(rank, argv))
        if dist.is_initialized():
            dist.destroy_process_group()
    return outcomes


def set_trap(number: int, event: str) -> None:
    from engine.batch.ledger import ShardWriter

    append, count = ShardWriter.append, 0

    def trapped(self: ShardWriter, completions: Any) -> None:
        nonlocal count
        count += 1
        if count < number or (event.startswith("sleep") and count > number):
            return append(self, completions)
        if event == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "kill inside":
            real = os.write

            def torn(fd: int, data: Any) -> int:
                real(fd, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
                return 0

            os.write = torn
        if event == "disk full":
            real_write = os.write

            def full(fd: int, data: Any) -> int:
                if len(data) > 10:
                    return real_write(fd, data[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            os.write = full
        event_name = event.removeprefix("sleep ")
        if event.startswith("sleep"):
            time.sleep(6.0)
        if event_name in ("SIGTERM", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, event_name))
        append(self, completions)
        if event == "kill after":
            os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.append = trapped


def command(job: Path, output: Path, *more: str) -> list[str]:
    files = ["--input", str(job / "in.jsonl"), "--output", str(output)]
    return ["--config", str(job / "config.yaml"), *files, *more]


def run(world: int, argv: list[str], trap: Any = None) -> list[tuple[int, str, str]]:
    return run_ranks(infer, world, argv, trap, timeout=120.0)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def committed(output: Path, num_ranks: int) -> set[int]:
    done: set[int] = set()
    for data_rank in range(num_ranks):
        with shard_path(shards_dir(output), data_rank).open("rb") as file:
            done |= {index for index, _, _ in scan_shard(file)}
    return done


def report(output: Path) -> dict[str, Any]:
    return json.loads(output.with_name(output.name + ".report.json").read_text())
