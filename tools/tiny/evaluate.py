"""Validation loss, unigram entropy, task accuracy and router balance of a tiny model.

Any model will do that maps token ids to logits; the figures of a checkpoint are taken with
transformers' own model on the stored weights. Sequences run one by one: no padding anywhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from math import log

import torch
from tiny.corpus import EOS_ID
from tiny.model import TinyMoe
from tiny.tasks import Record
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

LogitsFn = Callable[[Tensor], Tensor]  # int64 [1, S] -> float [1, S, V]


def text_chunks(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], max_tokens: int
) -> list[str]:
    """Cut documents at line ends into pieces of at most `max_tokens` tokens, BOS included.

    A piece that one overlong line makes too large is left out.
    """
    chunks: list[str] = []
    for document in documents:
        lines = document.splitlines(keepends=True)
        sizes = [len(ids) for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]]
        piece, used = "", 1
        for line, size in zip(lines, sizes, strict=True):
            if used + size > max_tokens:
                chunks.append(piece)
                piece, used = "", 1
            piece += line
            used += size
        chunks.append(piece)
    encoded = tokenizer(chunks)["input_ids"]
    return [
        chunk
        for chunk, ids in zip(chunks, encoded, strict=True)
        if chunk.strip() and len(ids) <= max_tokens
    ]


def unigram_entropy(tokenizer: PreTrainedTokenizerFast, chunks: list[str]) -> float:
    """Return the entropy of the chunks' token frequencies, nats per token: the unigram bound."""
    encoded = tokenizer(chunks, add_special_tokens=False)["input_ids"]
    counts = Counter(token for ids in encoded for token in ids)
    total = counts.total()
    return -sum(count / total * log(count / total) for count in counts.values())


@torch.no_grad()
def validation_loss(
    logits_fn: LogitsFn, tokenizer: PreTrainedTokenizerFast, chunks: list[str]
) -> float:
    """Mean negative log-likelihood of every token after BOS, in nats per token."""
    total, count = 0.0, 0
    for ids in tokenizer(chunks)["input_ids"]:
        ids_1S = torch.tensor([ids])
        logits_SV = logits_fn(ids_1S[:, :-1])[0].float()
        total += F.cross_entropy(logits_SV, ids_1S[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


@torch.no_grad()
def task_accuracy(
    logits_fn: LogitsFn, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> dict[str, float]:
    """Return share of records of each task whose greedy answer, EOS included, is exactly right.

    One forward pass per record is enough: greedy generation gives the answer if and only if the
    answer's every token is the most likely one after the prompt and the answer's tokens before it.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        prompt = tokenizer(record.prompt)["input_ids"]
        answer = [*tokenizer(record.answer, add_special_tokens=False)["input_ids"], EOS_ID]
        logits_SV = logits_fn(torch.tensor([prompt + answer[:-1]]))[0]
        greedy = logits_SV[len(prompt) - 1 :].argmax(dim=-1).tolist()
        right[record.task].append(greedy == answer)
    return {task: sum(hits) / len(hits) for task, hits in right.items()}


@torch.no_grad()
def router_loads(
    model: TinyMoe, tokenizer: PreTrainedTokenizerFast, chunks: list[str]
) -> list[list[int]]:
    """Return assignments to each expert of each layer over the chunks: [layers][experts]."""
    loads_LE = sum(model(torch.tensor([ids]))[2] for ids in tokenizer(chunks)["input_ids"])
    assert isinstance(loads_LE, Tensor)
    return loads_LE.tolist()


def max_over_mean(loads: list[list[int]]) -> list[float]:
    """Load of the busiest expert over the mean, per layer."""
    return [max(layer) / (sum(layer) / len(layer)) for layer in loads]
