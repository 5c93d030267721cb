"""Logit adjustments: bias, minimum length and penalties, before a token is chosen.

In the order that vLLM documents, each on the rows that ask for it alone:

    logit_bias             added to the logits of the tokens that it names
    min_tokens             tokens that would end the request are forbidden before it
    repetition_penalty     of every token of prompt and output: logits above 0 are divided by it,
                           others multiplied
    frequency_penalty      times the number of its occurrences in the output, subtracted
    presence_penalty       subtracted once per token of the output

Only the logits of these tokens are read and written; nothing of the vocabulary's size is made.

Legend: S rows that sample, V vocabulary, N (row, token) pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.ops.to_device import all_to_device
from engine.request import SamplingParams


class TokenCounts:
    """The distinct tokens of a sequence and how often each was generated, updated token by token.

    Args:
        with_prompt: list the tokens of the prompt too.
    """

    def __init__(self, with_prompt: bool) -> None:
        self._with_prompt = with_prompt
        self._place: dict[int, int] = {}  # token id -> its place in the arrays
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        self._num_read: int | None = None  # leading tokens of the sequence that are counted

    def read(self, token_ids: Sequence[int], num_prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """Count the tokens that are new; return all ids, int64, and their counts, float32."""
        if self._num_read is None:
            self._num_read = num_prompt
            for token in dict.fromkeys(token_ids[:num_prompt]) if self._with_prompt else ():
                self._place_of(token)
        for token in token_ids[self._num_read :]:
            place = self._place_of(token)  # may replace the arrays
            self._counts[place] += 1
        self._num_read = len(token_ids)
        size = len(self._place)
        return self._ids[:size], self._counts[:size]

    def _place_of(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        return place


@dataclass(frozen=True, slots=True)
class History:
    """What the adjustments of a row's logits depend on; of rows that ask for some alone."""

    params: SamplingParams
    token_ids: list[int]  # of the sequence: prompt, then generated; grows with it
    num_prompt: int
    stop_ids: Collection[int]  # tokens that end it
    counts: TokenCounts | None  # None without penalties

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        token_ids: list[int],
        num_prompt: int,
        stop_ids: Collection[int],
    ) -> History | None:
        """Return the history of a sequence, None where its logits are never adjusted."""
        if not (params.penalizes or params.logit_bias or params.min_tokens):
            return None
        counts = TokenCounts(params.repetition_penalty != 1) if params.penalizes else None
        return cls(params, token_ids, num_prompt, stop_ids, counts)


def adjust(logits_SV: Tensor, histories: Sequence[History | None]) -> None:
    """Overwrite the logits of the rows that have a history, float32 [S, V].

    Token ids of the vocabulary alone are touched. Copies host data to the device, never back.
    """
    vocab = logits_SV.shape[1]
    rows = [(row, history) for row, history in enumerate(histories) if history is not None]
    _add_bias(logits_SV, rows)
    _forbid_stops(logits_SV, rows, vocab)
    _penalize(logits_SV, [(row, each) for row, each in rows if each.counts is not None])


_Rows = list[tuple[int, History]]


def _add_bias(logits_SV: Tensor, rows: _Rows) -> None:
    biases = [
        (row, token, bias) for row, token, bias in _biases(rows) if token < logits_SV.shape[1]
    ]
    if biases:
        row_N, token_N, bias_N = zip(*biases, strict=True)
        at, sent = _send(logits_SV, row_N, token_N, np.array([bias_N], dtype=np.float32))
        logits_SV.index_put_(at, logits_SV[at] + sent[0])


def _biases(rows: _Rows) -> Iterator[tuple[int, int, float]]:
    for row, history in rows:
        for token, bias in history.params.logit_bias.items():
            yield row, token, bias


def _forbid_stops(logits_SV: Tensor, rows: _Rows, vocab: int) -> None:
    pairs = [
        (row, token)
        for row, history in rows
        if len(history.token_ids) - history.num_prompt < history.params.min_tokens
        for token in history.stop_ids
        if token < vocab
    ]
    if pairs:
        row_N, token_N = zip(*pairs, strict=True)
        forbidden = np.full((1, len(pairs)), -np.inf, dtype=np.float32)
        at, sent = _send(logits_SV, row_N, token_N, forbidden)
        logits_SV.index_put_(at, sent[0])


def _penalize(logits_SV: Tensor, rows: _Rows) -> None:
    if not rows:
        return
    tokens, counts, columns = [], [], []
    for _, history in rows:
        assert history.counts is not None
        ids_n, counts_n = history.counts.read(history.token_ids, history.num_prompt)
        params = history.params
        tokens.append(ids_n)
        counts.append(counts_n)
        columns.append(
            (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        )
    lengths = [len(each) for each in tokens]
    if not sum(lengths):
        return
    row_N = np.repeat([row for row, _ in rows], lengths)
    penalties_3N = np.repeat(np.array(columns, dtype=np.float32).T, lengths, axis=1)
    values_4N = np.concatenate([penalties_3N, np.concatenate(counts)[None]])
    at, sent = _send(logits_SV, row_N, np.concatenate(tokens), values_4N)
    repetition_N, frequency_N, presence_N, count_N = sent
    logits_N = logits_SV[at]
    logits_N = torch.where(logits_N > 0, logits_N / repetition_N, logits_N * repetition_N)
    logits_N = logits_N - frequency_N * count_N - presence_N * (count_N > 0)
    logits_SV.index_put_(at, logits_N)


def _send(
    logits_SV: Tensor,
    row_N: Sequence[int] | np.ndarray,
    token_N: Sequence[int] | np.ndarray,
    values_XN: np.ndarray,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the places of pairs in the logits, and values per pair, on the logits' device."""
    places_2N = np.stack([np.asarray(row_N, np.int64), np.asarray(token_N, np.int64)])
    hosts = [torch.from_numpy(places_2N), torch.from_numpy(np.ascontiguousarray(values_XN))]
    places, values = all_to_device(hosts, logits_SV.device)
    return (places[0], places[1]), values
