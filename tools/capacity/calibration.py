"""Calibration data for placements: two kinds of traffic, neither of them in the evaluation sets.

Texts are excerpts of the corpus' training files, which the checkpoints were trained on; validation
texts are from other files. Tasks are prompts that are not held out; evaluation prompts all are.
Both are checked against the evaluation sets, text by text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from capacity.jobs import TEXT, Item

TASKS = "tasks"  # the domain of all tasks together
_EXCERPTS = 4  # of one file, at most


def calibration_items(
    tokenizer: Any, evaluation: Sequence[Item], num_tokens: int, seed: int
) -> dict[str, list[Item]]:
    """Draw texts and tasks of about `num_tokens` tokens each; every item is scored only.

    Raises:
        ValueError: one of them is in the evaluation set.
    """
    from tiny.corpus import load_corpus
    from tiny.evaluate import text_chunks

    rng = random.Random(f"calibration-{seed}")
    documents = load_corpus().train
    rng.shuffle(documents)

    def draw_texts() -> list[str]:
        document = documents.pop()
        chunks = text_chunks(tokenizer, [document], tokenizer.model_max_length)
        return rng.sample(chunks, min(_EXCERPTS, len(chunks)))

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"])

    found = {
        TEXT: _fill(TEXT, lambda: [encode(text) for text in draw_texts()], num_tokens),
        TASKS: _fill(TASKS, lambda: [encode(each) for each in draw_tasks(rng)], num_tokens),
    }
    used = {item.prompt for item in evaluation}
    if shared := [item for items in found.values() for item in items if item.prompt in used]:
        raise ValueError(
            f"calibration: {len(shared)} items are in the evaluation set; use another --seed"
        )
    return found


def draw_tasks(rng: random.Random) -> list[str]:
    """Draw a prompt of every task, none of them held out for evaluation."""
    from tiny.tasks import TASKS as MAKERS
    from tiny.tasks import is_held_out

    prompts = []
    for make in MAKERS.values():
        while is_held_out(prompt := make(rng).prompt):
            pass
        prompts.append(prompt)
    return prompts


def assigned(items: Sequence[Item], ranks: int) -> list[Item]:
    """Number items and assign them to ranks round robin."""
    return [replace(item, index=n, rank=n % ranks) for n, item in enumerate(items)]


def _fill(domain: str, draw: Callable[[], list[tuple[int, ...]]], num_tokens: int) -> list[Item]:
    items: list[Item] = []
    total = 0
    while total < num_tokens:
        for prompt in draw():
            items.append(Item(domain=domain, prompt=prompt))
            total += len(prompt)
    return items
