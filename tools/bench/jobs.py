"""The generation jobs: which prompts, how many new tokens. Seeded: equal for all candidates."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Prompts as token ids; each is continued greedily by exactly `new_tokens`."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


JOBS = ("batch8", "ragged", "shared_prefix", "smoke")


def make_job(name: str, vocab_size: int) -> Job:
    """Build a job by name.

    batch8: 8 prompts of 128 tokens, 32 new each. ragged: 64 prompts of 16 to 384 tokens (12,964 in
    all), 64 new each. shared_prefix: 512 prompts in no order, each one of 4 prefixes of 256 tokens
    and 16 to 64 of its own, 32 new each. smoke: a few short prompts, to try the bench itself.
    """
    if name == "batch8":
        lengths, new_tokens = [128] * 8, 32
    elif name == "ragged":
        lengths_from = random.Random(322)  # the seed that gives 12,964 tokens
        lengths, new_tokens = [lengths_from.randint(16, 384) for _ in range(64)], 64
    elif name == "shared_prefix":
        return _shared_prefix(name, vocab_size)
    elif name == "smoke":
        lengths, new_tokens = [3, 11, 6], 4
    else:
        raise ValueError(f"job {name!r} does not exist; choose from {', '.join(JOBS)}")
    token = random.Random(7)
    prompts = tuple(tuple(token.randrange(3, vocab_size) for _ in range(n)) for n in lengths)
    return Job(name=name, prompts=prompts, new_tokens=new_tokens)


def _shared_prefix(name: str, vocab_size: int) -> Job:
    draw = random.Random(11)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocab_size) for _ in range(count))

    prefixes = [tokens(256) for _ in range(4)]
    prompts = [prefixes[index % 4] + tokens(draw.randint(16, 64)) for index in range(512)]
    draw.shuffle(prompts)
    return Job(name=name, prompts=tuple(prompts), new_tokens=32)
