"""The job that every setting runs: a checkpoint's text excerpts and task prompts on ranks.

One batch job for all: excerpts are scored by their log probabilities, prompts by whether greedy
generation gives the answer, end of sequence included (as in `tiny/evaluate.py`). Prompts are
shuffled with a fixed seed, because order `first` favours the first in a batch. All of it is made
in the parent process from text and numbers, so that all settings and ranks see one job.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TEXT = "text"  # the domain of validation.jsonl; the others are the tasks

Encode = Callable[[str, bool], list[int]]  # text, whether with special tokens -> token ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One request."""

    domain: str
    prompt: tuple[int, ...]  # token ids
    answer: tuple[int, ...] | None = None  # expected tokens with end of sequence; None: scored only
    index: int = -1  # in the job; breaks ties, and is the key of order `first`
    rank: int = -1  # that runs it


def read_items(data: Path, encode: Encode, eos_id: int, limit: int | None = None) -> list[Item]:
    """Read `data`/validation.jsonl and tasks.jsonl; at most `limit` items of each domain.

    Raises:
        ValueError: a file is missing.
    """
    rows = _read(data / "validation.jsonl", limit, lambda row: TEXT)
    items = [Item(domain=TEXT, prompt=tuple(encode(row["prompt"], True))) for row in rows]
    for row in _read(data / "tasks.jsonl", limit, lambda row: row["task"]):
        prompt, answer = encode(row["prompt"], True), encode(row["answer"], False)
        items.append(Item(domain=row["task"], prompt=tuple(prompt), answer=(*answer, eos_id)))
    return items


def assign_round_robin(items: Sequence[Item], ranks: int, seed: int) -> list[Item]:
    """Return shuffle, number and assign to ranks round robin: every rank sees every domain."""
    return [
        replace(item, index=index, rank=index % ranks)
        for index, item in enumerate(_shuffled(items, seed))
    ]


def assign_domains(items: Sequence[Item], ranks: int, seed: int) -> list[Item]:
    """Shuffle and give every rank domains of its own, see `domains_of_ranks`.

    A rank's items end where it has twice the tokens of the rank with fewest, so that ranks differ
    in domain far more than in size; the job is smaller than the mixed one.
    """
    owners = domains_of_ranks(_tokens_by_domain(items), ranks)
    of_rank: list[list[Item]] = [[] for _ in range(ranks)]
    seen: Counter[str] = Counter()
    for item in _shuffled(items, seed):
        mine = [rank for rank in range(ranks) if item.domain in owners[rank]]
        of_rank[mine[seen[item.domain] % len(mine)]].append(item)
        seen[item.domain] += 1
    most = 2 * min(_num_tokens(share) for share in of_rank)
    kept = []
    for rank, share in enumerate(of_rank):
        used = 0
        for number, item in enumerate(share):
            used += len(item.prompt)
            if used > most and number:  # one item at least, however long
                break
            kept.append(replace(item, rank=rank))
    # Interleaved, so that a request's number is independent of its rank.
    return [replace(item, index=index) for index, item in enumerate(_shuffled(kept, seed + 1))]


def domains_of_ranks(tokens: dict[str, int], ranks: int) -> list[frozenset[str]]:
    """Return the domains of each rank, from the prompt tokens of each domain.

    Fewer ranks than domains: the largest domain goes to the rank with fewest tokens, and so on.
    More: every domain has a rank, each further rank shares the domain with most tokens per rank.
    """
    largest_first = sorted(tokens, key=lambda name: (-tokens[name], name))
    owners: list[set[str]] = [set() for _ in range(ranks)]
    if ranks < len(tokens):
        load = [0] * ranks
        for name in largest_first:
            rank = load.index(min(load))
            owners[rank].add(name)
            load[rank] += tokens[name]
        return [frozenset(names) for names in owners]
    sharing = dict.fromkeys(largest_first, 1)
    for _ in range(ranks - len(tokens)):
        busiest = max(largest_first, key=lambda name: tokens[name] / sharing[name])
        sharing[busiest] += 1
    names = [name for name in largest_first for _ in range(sharing[name])]
    return [frozenset({name}) for name in names]


def composition(items: Sequence[Item], ranks: int) -> dict[str, object]:
    """Return items and prompt tokens of each domain and rank, for the report."""
    per_rank = [[item for item in items if item.rank == rank] for rank in range(ranks)]
    return {
        "items": dict(Counter(item.domain for item in items)),
        "prompt_tokens": _tokens_by_domain(items),
        "rank_prompt_tokens": [_num_tokens(share) for share in per_rank],
        "rank_domains": [sorted({item.domain for item in share}) for share in per_rank],
    }


def _num_tokens(items: Sequence[Item]) -> int:
    return sum(len(item.prompt) for item in items)


def _tokens_by_domain(items: Sequence[Item]) -> dict[str, int]:
    tokens: Counter[str] = Counter()
    for item in items:
        tokens[item.domain] += len(item.prompt)
    return dict(tokens)


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    return random.Random(seed).sample(list(items), len(items))


def _read(
    path: Path, limit: int | None, domain_of: Callable[[dict[str, str]], str]
) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"--data: {path} is missing; name a folder like a tiny checkpoint's eval/")
    taken: Counter[str] = Counter()
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            domain = domain_of(row)
            if limit is None or taken[domain] < limit:
                taken[domain] += 1
                rows.append(row)
    return rows
