"""Synthetic tasks with right answers: recall, sums, brackets, copying.

They give the tiny checkpoints something that a policy which drops tokens can break: an answer is
right or wrong, token by token. Every record is one line of text,

    recall: tiger blue, apple red, moon cold? apple    ->  red
    sum: 47 + 38 =                                     ->  85
    brackets: ( [ { } ( =>                             ->  ) ] )
    copy: tiger moon apple tiger =>                    ->  tiger moon apple tiger

and an answer starts with a space and is followed by the end-of-sequence token, so greedy
generation is checked by exact match. One prompt in ten, chosen by a hash of its text, is held out:
training never draws it, evaluation draws nothing else.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

HELD_OUT_ONE_IN = 10
OPEN_TO_CLOSE = {"(": ")", "[": "]", "{": "}", "<": ">"}
WORDS = (
    "air apple arm army art baby back ball band bank bear bed bell bird black blue boat body "
    "bone book box boy bread brown bus cake camp car card cat chair city clay cloth cloud coal "
    "coat cold color cow cup dark deep desk dog door dress drum dust eagle ear earth egg eye "
    "face farm fast fire fish flag floor flower food foot forest fox friend frog game garden "
    "girl glass goat gold grass green hair hand hat head heart hill home horse house ice iron "
    "island jacket key king kite knee lake lamp land leaf leg letter light lion lip map milk "
    "moon mouse mouth music nail neck nest night north nose ocean orange paper park pen pig "
    "pink pond queen rabbit rain red rice ring river road rock roof room root rope rose sail "
    "salt sand school sea seed sheep ship shoe silk silver sky sleep snow soap song soup south "
    "spoon spring square star stone storm street sugar summer sun table tail tea tent tiger "
    "tower town train tree truck valley wall warm water wave west wheel white wind window wine "
    "winter wolf wood wool world yard yellow"
).split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One task record: `prompt + answer` is the text; `known` marks extra predictable spans.

    `known` lists (start, end) character ranges of the prompt that repeat an earlier part, so
    training may weigh them like an answer.
    """

    task: str
    prompt: str
    answer: str
    known: tuple[tuple[int, int], ...] = ()


def make_recall(rng: random.Random, *, repeats: bool = False) -> Record:
    """Make 5 to 12 word pairs, then the first word of one: answer its second.

    With `repeats` some pairs appear twice, which shows the lookup many times in a record.
    """
    num_pairs = rng.randint(5, 12)
    words = rng.sample(WORDS, 2 * num_pairs)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    shown = pairs + rng.choices(pairs, k=num_pairs) if repeats else pairs
    prompt, known, seen = "recall:", [], set[str]()
    for index, (key, value) in enumerate(shown):
        prompt += f"{',' if index else ''} {key}"
        if key in seen:
            known.append((len(prompt), len(prompt) + len(value) + 1))
        prompt += f" {value}"
        seen.add(key)
    key, value = rng.choice(pairs)
    return Record(task="recall", prompt=f"{prompt}? {key}", answer=f" {value}", known=tuple(known))


def make_sum(rng: random.Random) -> Record:
    """Make two numbers of 0 to 99: answer their sum."""
    left, right = rng.randrange(100), rng.randrange(100)
    return Record(task="sum", prompt=f"sum: {left} + {right} =", answer=f" {left + right}")


def make_brackets(rng: random.Random) -> Record:
    """Make 4 to 16 brackets, 1 to 6 of them still open: answer the closing ones."""
    while True:
        length = rng.randint(4, 16)
        open_now: list[str] = []
        shown: list[str] = []
        for _ in range(length):
            if open_now and rng.random() < 0.45:
                shown.append(OPEN_TO_CLOSE[open_now.pop()])
            else:
                open_now.append(rng.choice(list(OPEN_TO_CLOSE)))
                shown.append(open_now[-1])
        if 1 <= len(open_now) <= 6:
            break
    answer = "".join(f" {OPEN_TO_CLOSE[bracket]}" for bracket in reversed(open_now))
    return Record(task="brackets", prompt=f"brackets: {' '.join(shown)} =>", answer=answer)


def make_copy(rng: random.Random) -> Record:
    """Make 4 to 14 words, some of them more than once: answer the same words."""
    pool = rng.sample(WORDS, 20)
    text = "".join(f" {word}" for word in rng.choices(pool, k=rng.randint(4, 14)))
    return Record(task="copy", prompt=f"copy:{text} =>", answer=text)


TASKS: dict[str, Callable[[random.Random], Record]] = {
    "recall": make_recall,
    "sum": make_sum,
    "brackets": make_brackets,
    "copy": make_copy,
}
# Share of records; a sum is short and needs the most repetitions.
TRAIN_SHARES = {"recall": 0.30, "sum": 0.38, "brackets": 0.18, "copy": 0.14}
# Once recall and copying are there, which come suddenly, sums are what is left to learn.
LATE_SHARES = {"recall": 0.20, "sum": 0.55, "brackets": 0.15, "copy": 0.10}


def is_held_out(prompt: str) -> bool:
    """Return whether `prompt` is reserved for evaluation; a pure function of its text."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def sample_train_record(rng: random.Random, shares: Mapping[str, float]) -> Record:
    """Draw one training record: tasks by their `shares`, never a held-out prompt."""
    while True:
        (task,) = rng.choices(list(shares), weights=list(shares.values()))
        if task == "recall":
            record = make_recall(rng, repeats=rng.random() < 0.5)
        else:
            record = TASKS[task](rng)
        if not is_held_out(record.prompt):
            return record


def evaluation_records(num_per_task: int, seed: int) -> list[Record]:
    """Draw `num_per_task` distinct held-out records of every task, task after task."""
    records: list[Record] = []
    for task, make in TASKS.items():
        rng = random.Random(f"{task}-{seed}")
        prompts: dict[str, Record] = {}
        while len(prompts) < num_per_task:
            record = make(rng)
            if is_held_out(record.prompt):
                prompts[record.prompt] = record
        records.extend(prompts.values())
    return records
