"""Line parser: one line of a batch input -> a `Request`, or a `Completion` with the error.

Input are the lines of `input_index.py`, in four forms:

    {"id": 1, "prompt": "..."}
    {"id": 1, "prompt_token_ids": [..]}
    {"id": 1, "messages": [{"role", "content"}]}   through the tokenizer's chat template
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {..}}
                                                   or /v1/chat/completions

The first three also take sampling parameters next to the prompt, by our names (`max_new_tokens`,
...) or OpenAI's (`max_tokens`, ...). Other keys are the user's own (an expected answer, a task
name) and are ignored, unless they look like a misspelt parameter. In an OpenAI body every key is
known or refused. What a line leaves out, or gives as null, comes from the config's `sampling`, not
from OpenAI's defaults.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine.batch.input_index import Line, line_id
from engine.batch.strict_json import parse_object, show
from engine.config import SamplingConfig
from engine.generation.tokenizer import PromptEncoder, tokenizer_failure
from engine.request import Completion, Request, SamplingParams, check_token_ids

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_OURS = frozenset(field.name for field in fields(SamplingParams))
_ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
# Parameters of OpenAI's API (and of other engines) that are not ours, with the values that have no
# effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": ({},),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
}
_PARAMETERS = _OURS | _ALIASES.keys() | _NEUTRAL.keys()
_NOT_COMPILED = ("TemplateSyntaxError", "TemplateAssertionError")  # of jinja2
_HARMLESS = frozenset({"model", "user", "metadata", "store", "service_tier", "parallel_tool_calls"})
_URLS = {"/v1/completions": ("prompt",), "/v1/chat/completions": ("messages",)}
_SHAPE = "give one of prompt, prompt_token_ids, messages, or an OpenAI batch line with a body"


class _LineError(ValueError):
    """The line cannot be run."""

    def __init__(self, message: str, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens  # length of the prompt, 0 where unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class LineParser:
    """Turns lines into requests and checks them."""

    sampling: SamplingConfig  # the defaults
    tokenizer: Any  # transformers', or None
    vocab_size: int  # token ids are below it
    max_model_len: int  # prompt + new tokens

    def __call__(self, line: Line) -> Request | Completion:
        """Return the request, or its error record for the output. No content of a line raises."""
        name = line_id(line.raw)
        prompt_tokens = 0
        try:
            return self._request(line, name)
        except _LineError as error:
            message, prompt_tokens = str(error), error.prompt_tokens
        except BaseException as error:  # nested too deeply, or of the tokenizer's own code
            message = str(tokenizer_failure("the line cannot be read", error))
        return Completion.failure(
            line.index, name, message, line=line.number, prompt_tokens=prompt_tokens
        )

    def _request(self, line: Line, name: str | int | None) -> Request:
        try:
            record = parse_object(line.raw)
        except ValueError as error:
            raise _LineError(str(error)) from error
        if name is None:
            key = "custom_id" if "custom_id" in record else "id"
            given = f"{key} = {show(record[key])}" if key in record else f"the line has no {key}"
            raise _LineError(f"{given}: must be text or a whole number")
        if line.duplicate_of:
            raise _LineError(
                f"id {name!r} was given before, on line {line.duplicate_of}; ids must be unique"
            )
        source, settings = _openai(record) if _is_openai(record) else _plain(record)
        params = self._params(settings)
        prompt = self._prompt(source)
        room = self.max_model_len - min(1, params.max_new_tokens)
        if len(prompt) > room:
            raise _LineError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.max_model_len}, "
                "of which at least one is for the answer; shorten the prompt",
                len(prompt),
            )
        return Request(index=line.index, id=name, prompt_token_ids=prompt, params=params)

    def _params(self, settings: dict[str, Any]) -> SamplingParams:
        try:
            params = SamplingParams.from_config(self.sampling, **settings)
        except (ValueError, OverflowError) as error:  # a number beyond every float overflows
            raise _LineError(str(error)) from error
        if params.stop and self.tokenizer is None:
            raise _LineError(
                f"stop = {show(params.stop)}: needs a tokenizer and the model has none; "
                "use stop_token_ids"
            )
        return params

    def _prompt(self, source: dict[str, Any]) -> Sequence[int]:
        given = [key for key in _PROMPTS if source.get(key) is not None]
        if len(given) != 1:
            what = f"the line has {' and '.join(given)}" if given else "the line has no prompt"
            raise _LineError(f"{what}: {_SHAPE}")
        key, value = given[0], source[given[0]]
        encoder = PromptEncoder(tokenizer=self.tokenizer, vocab_size=self.vocab_size)
        text = self._render(value) if key == "messages" else ""
        try:
            if key == "messages":  # the template has written the special tokens
                return encoder.encode_text(key, text, add_special_tokens=False)
            if key == "prompt":
                return encoder.encode(key, value)
            return check_token_ids(key, value, self.vocab_size)
        except ValueError as error:
            raise _LineError(str(error)) from error

    def _render(self, messages: Any) -> str:
        conversation = list(_conversation(messages))
        if not getattr(self.tokenizer, "chat_template", None):
            raise _LineError("messages: the tokenizer has no chat template; use prompt")
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template is a program: any error
            why = str(error) or type(error).__name__
            if type(error).__name__ in _NOT_COMPILED:
                raise _LineError(
                    "messages: the tokenizer's chat template does not compile (line "
                    f"{getattr(error, 'lineno', '?')}: {why}); correct chat_template.jinja, or "
                    "chat_template in tokenizer_config.json, or use prompt"
                ) from error
            raise _LineError(f"messages: the chat template refuses them: {why}") from error
        if text == "":
            raise _LineError(
                "messages: the tokenizer's chat template makes no text of them; check their roles "
                "and the template, or use prompt"
            )
        if not isinstance(text, str):
            raise _LineError(f"messages: the chat template gives {show(text)}, which is no text")
        return text


def _is_openai(record: dict[str, Any]) -> bool:
    return "custom_id" in record or "body" in record


def _plain(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a line in our own form into prompt and parameters; ignore the user's own keys."""
    settings = {}
    for key, value in record.items():
        if key in _PARAMETERS:
            settings[key] = value
        elif key not in _PROMPTS and key != "id" and (near := _intended(key)):
            raise _LineError(f"{key!r} is not a sampling parameter: did you mean {near!r}?")
    return record, _translate(settings, chat="messages" in record)


def _openai(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split an OpenAI batch line into its body and sampling parameters."""
    if "id" in record:
        raise _LineError("the line has both id and custom_id or body: an OpenAI line has custom_id")
    if (method := record.get("method", "POST")) != "POST":
        raise _LineError(f"method = {show(method)}: must be POST")
    body = record.get("body")
    if not isinstance(body, dict):
        raise _LineError(f"body = {show(body)}: must be an object with prompt or messages")
    url = record.get("url")
    if url is not None and (not isinstance(url, str) or url not in _URLS):
        raise _LineError(f"url = {show(url)}: must be one of {', '.join(_URLS)}")
    prompts = _PROMPTS if url is None else _URLS[url]
    settings = {}
    for key, value in body.items():
        if key in _PARAMETERS:
            settings[key] = value
        elif key not in prompts and key not in _HARMLESS and value is not None:
            near = _intended(key)
            hint = f": did you mean {near!r}?" if near else f" at {url}" if url else ""
            raise _LineError(f"body.{key} is not supported{hint}")
    return body, _translate(settings, chat="messages" in body)


def _translate(settings: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """Return the parameters by our names; raise _LineError for an unsupported one."""
    ours: dict[str, Any] = {}
    for key, value in settings.items():
        if value is None:
            continue
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                raise _LineError(f"{key} = {show(value)}: {key} is not supported")
            continue
        name = _ALIASES.get(key, key)
        if name in ours:
            others = [other for other in settings if _ALIASES.get(other, other) == name]
            raise _LineError(f"{' and '.join(others)} mean the same: give one of them")
        ours[name] = value
    # In OpenAI's completions this is the number of likeliest tokens to report log probabilities of;
    # here only the chosen token's is reported.
    if not chat and type(ours.get("logprobs")) is int and ours["logprobs"] in (0, 1):
        ours["logprobs"] = True
    return ours


def _conversation(messages: Any) -> Iterator[dict[str, Any]]:
    """Yield the messages, checked; contents given as several text parts are joined."""
    if not isinstance(messages, list) or not messages:
        raise _LineError(f"messages = {show(messages)}: must be a list of messages, not empty")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _LineError(f"{where} = {show(message)}: must be an object with role and content")
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            strings = [text for text in texts if isinstance(text, str)]
            if len(strings) < len(content):
                raise _LineError(f"{where}.content: only parts of type text are supported")
            content = "".join(strings)
        if not isinstance(content, str):
            raise _LineError(f"{where}.content = {show(content)}: must be text")
        yield {**message, "content": content}


def _intended(key: str) -> str | None:
    """Return the parameter that a key misspells: the same letters, or similar and long enough."""
    known = {_letters(name): name for name in sorted(_OURS | set(_ALIASES))}
    letters = _letters(key)
    if letters in known:
        return known[letters]
    near = difflib.get_close_matches(letters, known, n=1, cutoff=0.8) if len(letters) > 5 else []
    return known[near[0]] if near else None


def _letters(key: str) -> str:
    return re.sub("[^a-z0-9]", "", key.lower())
