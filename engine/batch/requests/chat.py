"""Chat: `messages` and the fields around them -> the text of a prompt, by the chat template.

What a template does with the fields is its own business: one that knows no tools ignores them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.batch.strict_json import show
from engine.request import RequestError

_NOT_COMPILED = ("TemplateSyntaxError", "TemplateAssertionError")  # of jinja2
# Arguments of `apply_chat_template`, which no template sees.
_NOT_FOR_TEMPLATES = frozenset(
    """
    add_generation_prompt chat_template continue_final_message conversation max_length padding
    return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools
    truncation
    """.split()
)


class ChatFields(BaseModel):
    """The fields next to `messages` that the chat template gets; null leaves one out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")
    reasoning_effort: str | None = Field(None, description="text, such as low, medium or high")
    tools: list[dict[str, Any]] | None = Field(None, description="a list of objects")
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = Field(
        None, description="none, auto, required, or an object that names a function"
    )
    add_generation_prompt: bool | None = Field(None, description="true or false")
    continue_final_message: bool | None = Field(None, description="true or false")

    @classmethod
    def read(cls, source: Mapping[str, Any]) -> ChatFields:
        """Return the fields of a line or body. Raises RequestError for a wrong value."""
        given = {name: source[name] for name in cls.model_fields if source.get(name) is not None}
        try:
            found = cls.model_validate(given)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            what = cls.model_fields[name].description
            message = f"{name} = {show(given[name])}: must be {what}"
            raise RequestError("invalid_value", message) from error
        for name in found.chat_template_kwargs or {}:
            if name in _NOT_FOR_TEMPLATES:
                message = f"chat_template_kwargs.{name}: is not a variable of chat templates; "
                message += "write it next to messages" if name in given else "leave it out"
                raise RequestError("invalid_value", message)
        if found.continue_final_message and found.add_generation_prompt:
            message = (
                "continue_final_message and add_generation_prompt contradict each other: give one "
                "of them"
            )
            raise RequestError("conflicting_settings", message)
        return found

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `apply_chat_template`, those alone that were given."""
        found = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            found["reasoning_effort"] = self.reasoning_effort
        if self.tools and self.tool_choice != "none":
            found["tools"] = self.tools
            if self.tool_choice is not None:
                found["tool_choice"] = self.tool_choice
        continues = bool(self.continue_final_message)
        if continues:
            found["continue_final_message"] = True
        adds = self.add_generation_prompt
        found["add_generation_prompt"] = not continues if adds is None else adds
        return found


CHAT_FIELDS = frozenset(ChatFields.model_fields)


def render(tokenizer: Any, messages: Any, fields: ChatFields) -> str:
    """Return the text of a conversation.

    Raises:
        RequestError: messages that are none, or that the tokenizer's template refuses.
    """
    template = getattr(tokenizer, "chat_template", None)
    conversation = list(_conversation(messages, knows_developer="developer" in str(template)))
    if not template:
        message = "messages: the tokenizer has no chat template; use prompt"
        raise RequestError("no_chat_template", message)
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **fields.arguments())
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


def _conversation(messages: Any, *, knows_developer: bool) -> Iterator[dict[str, Any]]:
    """Yield the messages as templates expect them, checked.

    Text parts are joined, the content beside tool calls may be null, their arguments become
    objects.

    Args:
        messages: as a user gave them.
        knows_developer: the template names this role; else its messages are the system's, since
            most templates leave out roles that they do not know.
    """
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
        found = {**message, "content": _content(where, message)}
        if message["role"] == "developer" and not knows_developer:
            found["role"] = "system"
        if message.get("tool_calls") is not None:
            found["tool_calls"] = _tool_calls(where, message["tool_calls"])
        yield found


def _content(where: str, message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        texts = [
            part.get("text")
            for part in content
            if isinstance(part, dict) and part.get("type", "text") == "text"
        ]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) < len(content):
            raise RequestError(
                "invalid_messages", f"{where}.content: only parts of type text are supported"
            )
        content = "".join(strings)
    if not isinstance(content, str):
        raise RequestError("invalid_messages", f"{where}.content = {show(content)}: must be text")
    return content


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Return the calls with their arguments as objects: templates write them as JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        message = f"{where}.tool_calls = {show(calls)}: must be a list of objects"
        raise RequestError("invalid_messages", message)
    found = []
    for number, call in enumerate(calls):
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(arguments, str):
            try:
                parsed = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                message = (
                    f"{where}.tool_calls[{number}].function.arguments = {show(arguments)}: must be "
                    "JSON"
                )
                raise RequestError("invalid_messages", message) from error
            call = {**call, "function": {**function, "arguments": parsed}}
        found.append(call)
    return found
