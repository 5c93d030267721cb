"""Detokenizer: token ids to text, and the end of a request by stop ids, stop strings or length.

Every sequence (`sequence.py`) has one `StopChecker`, called once per token. It owns a
`Detokenizer`, which decodes only when text is needed: after each token where there are stop
strings, else once at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.config.checkpoint_files import is_there, read_json_object
from engine.generation.tokenizer import tokenizer_failure
from engine.request import RequestError, SamplingParams

_REPLACEMENT = "\ufffd"  # what decoders return for bytes that are not, or not yet, a character
_CONTEXT_TOKENS = 5  # of the prompt, as the context of the first new token
_MAX_HELD = 64  # reads that may end in an incomplete character before its bytes count as invalid


class TokenDecoder(Protocol):
    """The part of a tokenizer that is used; those of `tokenizers` and `transformers` have it."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """Return the text of `ids`, with U+FFFD for bytes that form no character."""
        ...


def decode(tokenizer: TokenDecoder, ids: list[int]) -> str:
    """Return the text of token ids. Raises RequestError for whatever the tokenizer raises."""
    try:
        return tokenizer.decode(ids, skip_special_tokens=True)
    except BaseException as error:
        what = "the tokenizer cannot decode the tokens"
        raise tokenizer_failure("decoding_failed", what, error) from error


class Detokenizer:
    """The text of a growing list of token ids, released in whole characters.

    A token's text depends on its neighbours (a byte completes a character, a leading space is kept
    only inside a text), so a short window is decoded twice, with and without the new tokens, and
    the difference is the new text. The window starts where earlier text ended, so that the cost per
    token is constant. Special tokens have no text.
    """

    def __init__(self, tokenizer: TokenDecoder, context: Sequence[int] = ()) -> None:
        # The Rust tokenizer inside a transformers one decodes faster and never "cleans up" spaces.
        self._tokenizer: TokenDecoder = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._num_known = len(self._window)  # tokens of the window whose text is released
        self._known_chars: int | None = None  # their characters; None: not decoded yet
        self._num_held = 0
        self._pieces: list[str] = []

    def append(self, token_id: int) -> None:
        """Append a token; it is decoded by the next read."""
        self._window.append(token_id)

    def read(self) -> str:
        """Return the text that became final since the last read, without an incomplete character.

        After 64 consecutive reads that end in one, its bytes are released as U+FFFD.
        """
        if len(self._window) == self._num_known:
            return ""
        known_chars = self._chars_known()
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and self._num_held < _MAX_HELD:
            self._num_held += 1
            return ""
        self._num_held = 0
        piece = text[known_chars:]
        if not piece:  # tokens without text would only lengthen the window
            del self._window[self._num_known :]
            return ""
        del self._window[: self._num_known]
        self._num_known = len(self._window)
        self._known_chars = len(self._decode(self._window))
        self._pieces.append(piece)
        return piece

    def held(self) -> str:
        """Return the whole characters of the text that `read` has not released yet."""
        if len(self._window) == self._num_known:
            return ""
        return self._decode(self._window).rstrip(_REPLACEMENT)[self._chars_known() :]

    @property
    def text(self) -> str:
        """All text so far, in whole characters."""
        return self.released + self.held()

    @property
    def released(self) -> str:
        """The text that `read` has released; decodes nothing."""
        return "".join(self._pieces)

    def _decode(self, ids: list[int]) -> str:
        """Return the text of token ids. Raises RequestError for whatever the tokenizer raises."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            what = "the tokenizer cannot decode the new tokens"
            raise tokenizer_failure("decoding_failed", what, error) from error

    def _chars_known(self) -> int:
        """Return how many characters of the window are released."""
        if self._known_chars is None:
            # A prompt may end inside a character, which then belongs to the completion as a whole.
            self._known_chars = len(
                self._decode(self._window[: self._num_known]).rstrip(_REPLACEMENT)
            )
        return self._known_chars


class _StopSearch:
    """Finds the first of several texts in a growing one, of which some parts are not shown."""

    def __init__(self, stops: Collection[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._tail = ""  # the end of the text, where one of `stops` may have started
        self._shown = ""  # per character of it: "1" shown, "0" not
        self._num_before = 0  # characters before it that are shown
        self._allowed_from = 0  # a hit must end behind so many characters of the tail
        self.hit = ""  # of `stops` the one that was found

    def find(
        self, new: str, held: str = "", *, shown: bool = True, allowed: bool = True
    ) -> int | None:
        """Append text; return how many shown characters precede the first hit, None without one.

        Args:
            new: the text to append.
            held: text behind it that is searched too but not appended.
            shown: whether `new` is shown.
            allowed: whether a hit may end in it; else later text must complete one.
        """
        tail, mask = self._tail + new, self._shown + ("1" if shown else "0") * len(new)
        searched = tail + held
        if not allowed:
            self._allowed_from, searched = len(tail), ""
        begin = self._allowed_from + 1
        hits = [
            (at, stop)
            for stop in self._stops
            if (at := searched.find(stop, max(0, begin - len(stop)))) >= 0
        ]
        if hits:
            at, self.hit = min(hits, key=lambda hit: hit[0])
            return self._num_before + (mask + "1" * len(held)).count("1", 0, at)
        cut = max(0, len(tail) - self._longest + 1)
        self._num_before += mask.count("1", 0, cut)
        self._tail, self._shown = tail[cut:], mask[cut:]
        self._allowed_from = max(0, self._allowed_from - cut)
        return None


class StopChecker:
    """Decides, token by token, whether a request is finished and what its text is.

    The text ends before the stop string or stop token; the token ids contain both. Without a
    tokenizer the text is empty. A stop string that is a special token, which has no text, stops by
    the token's id; one that contains a special token is searched in the text with special tokens.

    Raises:
        RequestError: for stop strings without a tokenizer.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        tokenizer: TokenDecoder | None = None,
        eos_token_ids: Collection[int] = (),
        context: Sequence[int] = (),
    ) -> None:
        if params.stop and tokenizer is None:
            raise RequestError(
                "no_tokenizer",
                f"stop = {list(params.stop)!r}: stop strings need the model's tokenizer, and there "
                "is none; use stop_token_ids",
            )
        self._stop_ids = frozenset(params.stop_token_ids)
        self._own_ids = self._stop_ids  # that the request names
        if not params.ignore_eos:
            self._stop_ids |= frozenset(eos_token_ids)
        # The stop text or token id that ended the request; None for the end-of-sequence token.
        self.stop_reason: str | int | None = None
        self._search = _StopSearch(params.stop) if params.stop else None
        self._stop_texts: dict[int, str] = {}  # stop texts that are special tokens
        self._special: dict[int, str] = {}  # the special tokens that stop strings contain
        self._special_search: _StopSearch | None = None  # of those stop strings
        if params.stop:
            special = _special_tokens(tokenizer)
            self._stop_texts = {t: text for t, text in special.items() if text in params.stop}
            self._stop_ids |= self._stop_texts.keys()
            inside = [
                stop for stop in params.stop if any(text in stop for text in special.values())
            ]
            if inside := [stop for stop in inside if stop not in special.values()]:
                self._special = special
                self._special_search = _StopSearch(inside)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, context)
        self._text_end: int | None = None
        self._num_protected = params.min_tokens  # leading tokens still to come that end nothing

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids that end the request."""
        return self._stop_ids

    def check(self, token_id: int, *, full: bool) -> Literal["stop", "length"] | None:
        """Add one new token; return how the request ended, None if it continues.

        Args:
            token_id: the token.
            full: it is the last that the request may have.

        Raises:
            RequestError: the tokenizer cannot decode it.
        """
        if token_id in self._stop_ids:
            named = token_id if token_id in self._own_ids else None
            self.stop_reason = self._stop_texts.get(token_id, named)
            return "stop"
        if self._detokenizer is not None:
            self._detokenizer.append(token_id)
            if self._search is not None and self._found_stop(self._detokenizer, token_id, full):
                return "stop"
        return "length" if full else None

    @property
    def text(self) -> str:
        """The text so far, without the stop string. Raises RequestError as `check` does."""
        return "" if self._detokenizer is None else self._detokenizer.text[: self._text_end]

    @property
    def decoded_text(self) -> str:
        """The part of `text` that has been decoded already; "" where no text was needed yet."""
        return "" if self._detokenizer is None else self._detokenizer.released[: self._text_end]

    def _found_stop(self, detokenizer: Detokenizer, token_id: int, full: bool) -> bool:
        """Search the new text for a stop string; record where the text ends."""
        assert self._search is not None
        new = detokenizer.read()
        held = detokenizer.held() if full else ""
        allowed = self._num_protected <= 0
        self._num_protected -= 1
        ends = [self._search.find(new, held, allowed=allowed)]
        if self._special_search is not None:
            search = self._special_search
            ends.append(search.find(new, held, allowed=allowed))
            if token_id in self._special:
                text = self._special[token_id]
                ends.append(search.find(text, shown=False, allowed=allowed))
        found = [end for end in ends if end is not None]
        self._text_end = min(found, default=None)
        if found:
            plain = ends[0] is not None and ends[0] == self._text_end
            search = self._search if plain else self._special_search
            self.stop_reason = None if search is None else search.hit
        return bool(found)


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens, which decoding leaves out: id -> how the tokenizer writes it.

    Raises:
        RequestError: for whatever the tokenizer raises.
    """
    try:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if hasattr(backend, "get_added_tokens_decoder"):
            added = backend.get_added_tokens_decoder()
            return {token: each.content for token, each in added.items() if each.special}
        texts = getattr(tokenizer, "all_special_tokens", ())  # of one that is written in Python
        return {tokenizer.convert_tokens_to_ids(text): text for text in texts}
    except BaseException as error:
        what = "stop: the tokenizer does not list its tokens"
        raise tokenizer_failure("tokenizer_failed", what, error) from error


def load_eos_token_ids(model_path: str | Path, tokenizer: Any = None) -> frozenset[int]:
    """Return the end-of-text ids of generation_config.json (else config.json) and the tokenizer.

    Empty when none of them names one.

    Raises:
        ValueError: when a file cannot be read or has no JSON object, or eos_token_id is no id or
            list of ids.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        if not is_there(file):
            continue
        values = read_json_object(file)
        if "eos_token_id" not in values and isinstance(values.get("text_config"), dict):
            values = values["text_config"]  # the language model's, of a model that has more parts
        value = values.get("eos_token_id")
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int for item in found):
            raise ValueError(
                f"{file}: eos_token_id = {value!r}: must be a token id or a list of them"
            )
        ids.update(found)
        if ids:
            break
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(ids if own is None else ids | {own})
