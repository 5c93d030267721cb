"""Line parser: one line of a batch input -> a `Request`, or a `Completion` with the error.

Input are the lines of `input/pending.py`, in four forms:

    {"id": 1, "prompt": "..."}
    {"id": 1, "prompt_token_ids": [..]}
    {"id": 1, "messages": [{"role", "content"}]}   through the tokenizer's chat template
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {..}}
                                                   or /v1/chat/completions

The first three also take sampling parameters next to the prompt, by our names (`max_new_tokens`,
...) or OpenAI's (`max_tokens`, ...); `line_settings.py` separates them from the user's own keys.
What a line leaves out, or gives as null, comes from the config's `sampling`, not from OpenAI's
defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from engine.batch.input.index import line_id
from engine.batch.input.pending import Line
from engine.batch.line_settings import (
    UserKeys,
    check_outside_body,
    split_body,
    split_plain,
    to_sampling_names,
)
from engine.batch.other_engines import prompt_name
from engine.batch.requests.chat import ChatFields, render
from engine.batch.requests.fields import ChatBody, CompletionBody, OwnLine, check_fields
from engine.batch.strict_json import parse_object, show
from engine.config import SamplingConfig
from engine.generation.prompt_encoder import PromptEncoder
from engine.generation.tokenizer import tokenizer_failure
from engine.request import (
    MAX_CHOICES,
    Completion,
    Endpoint,
    Request,
    RequestError,
    SamplingParams,
    check_logit_bias,
    check_token_ids,
)

# Of a line: what has the prompt, settings by the names of `SamplingParams`, keys of the user's own.
_Parts = tuple[dict[str, Any], dict[str, Any], list[str]]

_Prompt = tuple[Sequence[int], str | None]  # token ids, and the text that was given

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_OF_PLAIN = frozenset({*_PROMPTS, "id"})
_OF_OPENAI = frozenset({"custom_id", "method", "url", "body"})
_CHAT: Endpoint = "/v1/chat/completions"
_URLS = {"/v1/completions": ("prompt",), _CHAT: ("messages",)}
# Of an endpoint, None for our own form.
_TABLES: dict[Endpoint | None, type[BaseModel]] = {
    None: OwnLine,
    "/v1/completions": CompletionBody,
    _CHAT: ChatBody,
}
_SHAPE = "give one of prompt, prompt_token_ids, messages, or an OpenAI batch line with a body"


@dataclass(frozen=True, kw_only=True, slots=True)
class LineParser:
    """Turns lines into requests and checks them."""

    sampling: SamplingConfig  # the defaults
    tokenizer: Any  # transformers', or None
    vocab_size: int  # token ids are below it
    max_model_len: int  # prompt + new tokens
    user_keys: UserKeys = field(default_factory=UserKeys)  # of the lines parsed so far

    def __call__(self, line: Line) -> Request | Completion:
        """Return the request, or its error record for the output. No content of a line raises."""
        name = line_id(line.raw)
        try:
            return self._request(line, name)
        except RequestError as error:
            problem = error
        except BaseException as error:  # nested too deeply, or of the tokenizer's own code
            problem = tokenizer_failure("unreadable_line", "the line cannot be read", error)
        return Completion.failure(line.index, name, problem, line=line.number)

    def _request(self, line: Line, name: str | int | None) -> Request:
        try:
            record = parse_object(line.raw)
        except ValueError as error:
            raise RequestError("invalid_json", str(error)) from error
        if name is None:
            key = "custom_id" if "custom_id" in record else "id"
            given = f"{key} = {show(record[key])}" if key in record else f"the line has no {key}"
            raise RequestError("invalid_id", f"{given}: must be text or a whole number")
        if line.duplicate_of:
            earlier = line.earlier or f"line {line.duplicate_of}"
            raise RequestError(
                "duplicate_id",
                f"id {name!r} was given before, on {earlier}; ids must be unique",
            )
        source, settings, own = _openai(record) if _is_openai(record) else _plain(record)
        self.user_keys.add(own)
        params = self._params(settings)
        prompts = self._prompts(source)
        room = self.max_model_len - min(1, params.max_new_tokens)
        for place, (prompt, _) in enumerate(prompts):
            if len(prompt) > room:
                which = "the prompt" if len(prompts) == 1 else f"prompt[{place}]"
                raise RequestError(
                    "context_length_exceeded",
                    f"{which} has {len(prompt)} tokens and the context holds "
                    f"{self.max_model_len}, of which at least one is for the answer; shorten the "
                    "prompt",
                    len(prompt),
                )
        endpoint = _endpoint(record)
        check_fields(_TABLES[endpoint], source)
        return Request.of_line(
            line.index,
            name,
            [prompt for prompt, _ in prompts],
            params,
            prompt_texts=[text for _, text in prompts],
            endpoint=endpoint,
        )

    def _params(self, settings: dict[str, Any]) -> SamplingParams:
        try:
            params = SamplingParams.from_config(self.sampling, **settings)
        except (ValueError, OverflowError) as error:  # a number beyond every float overflows
            raise RequestError("invalid_value", str(error)) from error
        check_logit_bias(params, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise RequestError(
                "no_tokenizer",
                f"stop = {show(params.stop)}: needs a tokenizer and the model has none; "
                "use stop_token_ids",
            )
        return params

    def _prompts(self, source: dict[str, Any]) -> list[_Prompt]:
        """Return the line's prompts: one, or several where `prompt` is a list of them."""
        given = [key for key in _PROMPTS if source.get(key) is not None]
        if len(given) != 1:
            what = f"the line has {' and '.join(given)}" if given else "the line has no prompt"
            theirs = None if given else prompt_name(source)
            hint = _SHAPE if theirs is None else f"write {theirs[1]} instead of {theirs[0]}"
            raise RequestError("invalid_request", f"{what}: {hint}")
        key, value = given[0], source[given[0]]
        encoder = PromptEncoder(self.tokenizer, self.vocab_size, self.max_model_len)
        if key == "messages":  # the template writes the special tokens
            text = render(self.tokenizer, value, ChatFields.read(source))
            return [(encoder.encode_text(key, text, add_special_tokens=False), text)]
        if key == "prompt_token_ids":
            return [(check_token_ids(key, value, self.vocab_size), None)]
        several = isinstance(value, list) and any(isinstance(item, str | list) for item in value)
        if several and len(value) > MAX_CHOICES:
            message = f"prompt: has {len(value)} prompts; a line may have {MAX_CHOICES}"
            raise RequestError("invalid_request", message)
        named = [(f"prompt[{n}]", item) for n, item in enumerate(value)] if several else []
        return [
            (encoder.encode(where, item), item if isinstance(item, str) else None)
            for where, item in named or [("prompt", value)]
        ]


def _is_openai(record: dict[str, Any]) -> bool:
    return "custom_id" in record or "body" in record


def _endpoint(record: dict[str, Any]) -> Endpoint | None:
    """Return the endpoint of an OpenAI line, by its body where it has no url; else None."""
    if not _is_openai(record):
        return None
    url = record.get("url")
    is_chat = record["body"].get("messages") is not None if url is None else url == _CHAT
    return _CHAT if is_chat else "/v1/completions"


def _plain(record: dict[str, Any]) -> _Parts:
    """Split a line in our own form."""
    settings, own = split_plain(record, _OF_PLAIN)
    return record, to_sampling_names(settings, chat="messages" in record), own


def _openai(record: dict[str, Any]) -> _Parts:
    """Split an OpenAI batch line."""
    if "id" in record:
        message = "the line has both id and custom_id or body: an OpenAI line has custom_id"
        raise RequestError("invalid_request", message)
    if (method := record.get("method", "POST")) != "POST":
        raise RequestError("invalid_request", f"method = {show(method)}: must be POST")
    body = record.get("body")
    if not isinstance(body, dict):
        message = f"body = {show(body)}: must be an object with prompt or messages"
        raise RequestError("invalid_request", message)
    url = record.get("url")
    if url is not None and (not isinstance(url, str) or url not in _URLS):
        message = f"url = {show(url)}: must be one of {', '.join(_URLS)}"
        raise RequestError("invalid_request", message)
    own = check_outside_body(record, _OF_OPENAI)
    settings = split_body(body, _PROMPTS if url is None else _URLS[url], url)
    return body, to_sampling_names(settings, chat="messages" in body), own
