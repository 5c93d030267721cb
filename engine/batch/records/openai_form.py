"""Records in OpenAI's form: the lines of a batch's output file and of its error file.

    {"id", "custom_id", "response": {"status_code": 200, "request_id", "body"}, "error": null}
    {"id", "custom_id", "response": {"status_code": 400, ...}, "error": null}   a refused request
    {"id", "custom_id", "response": null, "error": {"code", "message"}}         the engine failed it

A body is a whole `chat.completion` or `text_completion`. What OpenAI has no place for is inside of
`lockstep`, which clients ignore: the capacity account, log probabilities of the prompt, the line's
number. All ids are made of the job and the line, so a line that runs again has the same ones.
Tokens with their log probabilities are joined from parts that `token_texts.py` keeps as JSON:
building a Python object for each of 3000 candidates would take as long as a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import add
from typing import Any

import orjson

from engine.batch.records.json_bytes import to_json
from engine.batch.records.token_texts import TokenText, TokenTexts
from engine.request import CapacityUse, Completion, Endpoint, usage_of

# What the engine met while it ran a request; all else was wrong with the request itself.
_ENGINE_FAILURES = ("non_finite_logits", "decoding_failed")
_LEAST = b"-9999.0"  # OpenAI's number for a token that cannot occur; JSON has no -Infinity

_Candidates = Sequence[Sequence[tuple[int, float]] | None] | None


class OpenAIRecords:
    """Writes the records of one job."""

    def __init__(self, job: str, created: int, model: str, tokenizer: Any = None) -> None:
        """Describe the job.

        Args:
            job: its number, 16 hex digits.
            created: when it began, in seconds of the Unix clock; equal in all of its records.
            model: name of the model.
            tokenizer: writes the tokens of log probabilities; None: their ids are written.
        """
        self._job, self._created, self._model = job, created, model
        self._tokens = TokenTexts(tokenizer)

    def __call__(self, completion: Completion) -> bytes:
        """Return the record of a line, with all its choices."""
        name = f"{self._job}{completion.index:08x}"
        failed = next((each for each in completion.choices if each.error is not None), None)
        response = error = None
        if failed is None:
            response = self._response(name, 200, self._body(name, completion))
        elif (problem := failed.error or {})["code"] in _ENGINE_FAILURES:
            error = {
                "code": problem["code"],
                "message": _text(problem["message"]),
                "lockstep": {
                    **_place(problem),
                    "text": _text(failed.text),
                    "token_ids": failed.token_ids,
                },
            }
        else:
            body = {
                "error": {
                    "message": _text(problem["message"]),
                    "type": "invalid_request_error",
                    "param": problem.get("param"),
                    "code": problem["code"],
                    "lockstep": _place(problem),
                }
            }
            response = self._response(name, 400, body)
        return to_json(
            {
                "id": f"batch_req_{name}",
                "custom_id": _text(completion.id),
                "response": response,
                "error": error,
            }
        )

    def _response(self, name: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
        return {"status_code": status, "request_id": f"req_{name}", "body": body}

    def _body(self, name: str, completion: Completion) -> dict[str, Any]:
        choices = completion.choices
        request = completion.request
        endpoint: Endpoint | None = None if request is None else request.endpoint
        is_chat = endpoint == "/v1/chat/completions"
        make_choice = self._chat_choice if is_chat else self._text_choice
        return {
            "id": f"chatcmpl-{name}" if is_chat else f"cmpl-{name}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [make_choice(index, each) for index, each in enumerate(choices)],
            "usage": _usage(choices),
            "lockstep": _own_account(choices),
        }

    def _chat_choice(self, index: int, choice: Completion) -> dict[str, Any]:
        logprobs = None
        if choice.logprobs is not None:
            content = self._content(choice.token_ids, choice.logprobs, choice.top_logprobs)
            logprobs = {"content": content, "refusal": None}
        return {
            "index": index,
            "message": {"role": "assistant", "content": _text(choice.text), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _text_choice(self, index: int, choice: Completion) -> dict[str, Any]:
        ids, logprobs, candidates = choice.token_ids, choice.logprobs, choice.top_logprobs
        request = choice.request
        if logprobs is not None and request is not None and getattr(request.params, "echo", False):
            prompt = request.prompt_token_ids
            unknown = [None] * len(prompt)
            ids = [*prompt, *ids]
            logprobs = [*(choice.prompt_logprobs or unknown), *logprobs]
            if candidates is not None or choice.prompt_top_logprobs is not None:
                after = candidates or [None] * len(choice.token_ids)
                candidates = [*(choice.prompt_top_logprobs or unknown), *after]
        shown = None
        if logprobs is not None:
            shown = self._arrays(ids, logprobs, candidates, choice.text)
        return {
            "index": index,
            "text": _text(choice.text),
            "logprobs": shown,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _content(
        self, ids: Sequence[int], logprobs: Sequence[float], candidates: _Candidates
    ) -> orjson.Fragment:
        """Return the tokens as chats have them: a list of objects."""
        tokens, top = self._tokens, b',"top_logprobs":[]}'
        # Each object up to and with its number.
        own = list(map(add, [tokens[token].entry for token in ids], _numbers(logprobs)))
        if candidates is None:
            return orjson.Fragment(b"[%b]" % b",".join([part + top for part in own]))
        pairs = [pair for found in candidates for pair in found or ()]
        numbers = _numbers([number for _, number in pairs])
        others = list(map(add, [tokens[token].entry for token, _ in pairs], numbers))
        entries, at = [], 0
        for part, found in zip(own, candidates, strict=True):
            begin, at = at, at + len(found or ())
            if found:
                top = b',"top_logprobs":[%b}]}' % b"},".join(others[begin:at])
            else:
                top = b',"top_logprobs":[]}'
            entries.append(part + top)
        return orjson.Fragment(b"[%b]" % b",".join(entries))

    def _arrays(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        candidates: _Candidates,
        text: str,
    ) -> orjson.Fragment:
        """Return the tokens as text completions have them: an array per kind of value."""
        tokens = [self._tokens[token] for token in ids]
        top = b"null"
        if candidates is not None:
            top = b"[%b]" % b",".join(self._dicts(candidates))
        # Nothing precedes the first token of a prompt: null, not the least number.
        known = iter(_numbers(_present(logprobs)))
        own = (b"null" if number is None else next(known) for number in logprobs)
        return orjson.Fragment(
            b'{"tokens":[%b],"token_logprobs":[%b],"top_logprobs":%b,"text_offset":%b}'
            % (
                b",".join([token.text for token in tokens]),
                b",".join(own),
                top,
                orjson.dumps(_offsets(tokens, text)),
            )
        )

    def _dicts(self, candidates: Sequence[Sequence[tuple[int, float]] | None]) -> Iterator[bytes]:
        """Yield each place's candidates by their texts; of equal texts the likeliest."""
        tokens = self._tokens
        pairs = [pair for found in candidates for pair in found or ()]
        keys = [tokens[token].key for token, _ in pairs]
        parts = list(map(add, keys, _numbers([number for _, number in pairs])))
        at = 0
        for found in candidates:
            if found is None:
                yield b"null"
                continue
            begin, at = at, at + len(found)
            shown = parts[begin:at]
            if tokens.has_twins:
                first: dict[bytes, bytes] = {}
                for key, part in zip(keys[begin:at], shown, strict=True):
                    first.setdefault(key, part)
                shown = list(first.values())
            yield b"{%b}" % b",".join(shown)


def _place(problem: dict[str, Any]) -> dict[str, Any]:
    """Return where the line of an error is: its number, and its file where there are several."""
    return {key: problem[key] for key in ("line", "file") if key in problem}


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _numbers(values: Sequence[float]) -> list[bytes]:
    """Return each number as JSON."""
    if not values:
        return []
    text = orjson.dumps(list(values), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    return text.replace(b"null", _LEAST).split(b",")


def _offsets(tokens: Sequence[TokenText], text: str) -> list[int]:
    """Return where each token begins in the text, in characters."""
    # The first word of a text may have lost its leading space.
    lost = bool(tokens) and tokens[0].text.startswith(b'" ') and not text.startswith(" ")
    ends = accumulate((token.num_chars for token in tokens[:-1]), initial=0)
    limit = len(text)
    found = [min(max(0, end - lost), limit) for end in ends]
    return found[: len(tokens)]


def _text(value: Any) -> Any:
    """Return a text or an id for a record that holds `orjson.Fragment`, whatever it has in it."""
    return orjson.Fragment(to_json(value))


def _usage(choices: list[Completion]) -> dict[str, Any]:
    usage = usage_of(choices)
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }


def _own_account(choices: list[Completion]) -> dict[str, Any]:
    """Return what OpenAI's bodies have no place for."""
    total = CapacityUse()
    for choice in choices:
        total.add(choice.capacity)
    account: dict[str, Any] = {"capacity": total.record()}
    if any(choice.prompt_logprobs is not None for choice in choices):
        account["prompt_logprobs"] = [choice.prompt_logprobs for choice in choices]
    return account
