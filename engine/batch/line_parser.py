"""Line parser: one line of a batch input -> a `Request`, or a `Completion` with the error.

Input are the lines of `input_index.py`, in four forms:

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.batch.input_index import Line, line_id
from engine.batch.line_settings import (
    UserKeys,
    check_outside_body,
    split_body,
    split_plain,
    to_sampling_names,
)
from engine.batch.other_engines import prompt_name
from engine.batch.strict_json import parse_object, show
from engine.config import SamplingConfig
from engine.generation.prompt_encoder import PromptEncoder
from engine.generation.tokenizer import tokenizer_failure
from engine.request import (
    Completion,
    Request,
    RequestError,
    SamplingParams,
    check_logit_bias,
    check_token_ids,
)

# Of a line: what has the prompt, settings by the names of `SamplingParams`, keys of the user's own.
_Parts = tuple[dict[str, Any], dict[str, Any], list[str]]

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_OF_PLAIN = frozenset({*_PROMPTS, "id"})
_OF_OPENAI = frozenset({"custom_id", "method", "url", "body"})
_NOT_COMPILED = ("TemplateSyntaxError", "TemplateAssertionError")  # of jinja2
_URLS = {"/v1/completions": ("prompt",), "/v1/chat/completions": ("messages",)}
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
            raise RequestError(
                "duplicate_id",
                f"id {name!r} was given before, on line {line.duplicate_of}; ids must be unique",
            )
        source, settings, own = _openai(record) if _is_openai(record) else _plain(record)
        self.user_keys.add(own)
        params = self._params(settings)
        prompt = self._prompt(source)
        room = self.max_model_len - min(1, params.max_new_tokens)
        if len(prompt) > room:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {len(prompt)} tokens and the context holds {self.max_model_len}, "
                "of which at least one is for the answer; shorten the prompt",
                len(prompt),
            )
        return Request(index=line.index, id=name, prompt_token_ids=prompt, params=params)

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

    def _prompt(self, source: dict[str, Any]) -> Sequence[int]:
        given = [key for key in _PROMPTS if source.get(key) is not None]
        if len(given) != 1:
            what = f"the line has {' and '.join(given)}" if given else "the line has no prompt"
            theirs = None if given else prompt_name(source)
            hint = _SHAPE if theirs is None else f"write {theirs[1]} instead of {theirs[0]}"
            raise RequestError("invalid_request", f"{what}: {hint}")
        key, value = given[0], source[given[0]]
        encoder = PromptEncoder(self.tokenizer, self.vocab_size, self.max_model_len)
        if key == "messages":  # the template writes the special tokens
            return encoder.encode_text(key, self._render(value), add_special_tokens=False)
        if key == "prompt":
            return encoder.encode(key, value)
        return check_token_ids(key, value, self.vocab_size)

    def _render(self, messages: Any) -> str:
        conversation = list(_conversation(messages))
        if not getattr(self.tokenizer, "chat_template", None):
            message = "messages: the tokenizer has no chat template; use prompt"
            raise RequestError("no_chat_template", message)
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template is a program: any error
            why = str(error) or type(error).__name__
            message = f"messages: the chat template refuses them: {why}"
            if type(error).__name__ in _NOT_COMPILED:
                message = (
                    "messages: the tokenizer's chat template does not compile (line "
                    f"{getattr(error, 'lineno', '?')}: {why}); correct chat_template.jinja, or "
                    "chat_template in tokenizer_config.json, or use prompt"
                )
            raise RequestError("chat_template_failed", message) from error
        if text == "":
            message = (
                "messages: the tokenizer's chat template makes no text of them; check their roles "
                "and the template, or use prompt"
            )
            raise RequestError("chat_template_failed", message)
        if not isinstance(text, str):
            message = f"messages: the chat template gives {show(text)}, which is no text"
            raise RequestError("chat_template_failed", message)
        return text


def _is_openai(record: dict[str, Any]) -> bool:
    return "custom_id" in record or "body" in record


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


def _conversation(messages: Any) -> Iterator[dict[str, Any]]:
    """Yield the messages, checked; contents given as several text parts are joined."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(
            "invalid_messages",
            f"messages = {show(messages)}: must be a list of messages, not empty",
        )
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(
                "invalid_messages",
                f"{where} = {show(message)}: must be an object with role and content",
            )
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            strings = [text for text in texts if isinstance(text, str)]
            if len(strings) < len(content):
                raise RequestError(
                    "invalid_messages", f"{where}.content: only parts of type text are supported"
                )
            content = "".join(strings)
        if not isinstance(content, str):
            raise RequestError(
                "invalid_messages", f"{where}.content = {show(content)}: must be text"
            )
        yield {**message, "content": content}
