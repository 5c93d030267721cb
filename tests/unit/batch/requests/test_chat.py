"""Conversations and the fields around them. Run: pytest tests/unit/batch/requests/test_chat.py"""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from engine.batch.input.pending import Line
from engine.batch.line_parser import LineParser
from engine.batch.requests.chat import ChatFields, render
from engine.config import SamplingConfig
from engine.request import Completion, Request, RequestError

# Writes all that it is given.
TEMPLATE = """
{%- if tools %}[tools {{ tools | map(attribute='function.name') | join(',') }}
{{- ' ' ~ tool_choice if tool_choice }}]{% endif %}
{%- if reasoning_effort %}[effort {{ reasoning_effort }}]{% endif %}
{%- if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.x }}]
{%- endfor %}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def text(messages, template=TEMPLATE, **fields) -> str:
    model = WordLevel({"hi": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    tokenizer.chat_template = template
    return render(tokenizer, messages, ChatFields.read(fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "<user>hi<assistant>"),
        ({"add_generation_prompt": False}, "<user>hi"),
        ({"continue_final_message": True}, "<user>hi"),
        ({"reasoning_effort": "low"}, "[effort low]<user>hi<assistant>"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "[thinking False]<user>hi<assistant>",
        ),
        ({"tools": TOOLS}, "[tools add]<user>hi<assistant>"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "[tools add auto]<user>hi<assistant>"),
        ({"tools": TOOLS, "tool_choice": "none"}, "<user>hi<assistant>"),
        ({"tools": None, "tool_choice": None, "reasoning_effort": None}, "<user>hi<assistant>"),
    ],
)
def test_the_template_gets_the_fields_beside_the_messages(fields, expected):
    assert text(HI, **fields) == expected


def test_tool_calls_have_no_content_and_their_arguments_are_objects():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"x": 3}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]},
    ]
    assert text(messages) == "<user>hi<assistant>[add 3]<tool>4<assistant>"


def test_the_developer_is_the_system_where_the_template_does_not_know_it():
    messages = [{"role": "developer", "content": "be kind"}, *HI]
    assert text(messages) == "<system>be kind<user>hi<assistant>"
    assert text(messages, TEMPLATE + "{# developer #}").startswith("<developer>be kind")


@pytest.mark.parametrize(
    ("messages", "fields", "code", "part"),
    [
        (HI, {"tools": {}}, "invalid_value", "tools = {}: must be a list of objects"),
        (HI, {"tool_choice": "any"}, "invalid_value", 'tool_choice = "any": must be none, auto'),
        (HI, {"reasoning_effort": 3}, "invalid_value", "reasoning_effort = 3: must be text"),
        (HI, {"add_generation_prompt": 1}, "invalid_value", "must be true or false"),
        (HI, {"chat_template_kwargs": [1]}, "invalid_value", "[1]: must be an object"),
        (
            HI,
            {"chat_template_kwargs": {"tokenize": True}},
            "invalid_value",
            "chat_template_kwargs.tokenize: is not a variable",
        ),
        (
            HI,
            {"continue_final_message": True, "add_generation_prompt": True},
            "conflicting_settings",
            "contradict each other",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            {},
            "invalid_messages",
            "messages[0].content: only parts of type text",
        ),
        ([{"role": "user", "content": None}], {}, "invalid_messages", "content = null"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
            {},
            "invalid_messages",
            'tool_calls[0].function.arguments = "{": must be JSON',
        ),
    ],
)
def test_a_wrong_field_is_refused_by_name(messages, fields, code, part):
    with pytest.raises(RequestError) as caught:
        text(messages, **fields)
    assert caught.value.code == code
    assert part in str(caught.value)


def parse(record: dict) -> Request | Completion:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"hi": 0, "[UNK]": 1}, unk_token="[UNK]"))
    )
    tokenizer.chat_template = TEMPLATE
    parser = LineParser(
        sampling=SamplingConfig(), tokenizer=tokenizer, vocab_size=9, max_model_len=99
    )
    return parser(Line(0, 1, json.dumps(record).encode()))


def test_fields_of_chat_and_of_completions_are_told_apart():
    for beside, part in (
        ({"prompt": "hi", "tools": TOOLS}, "tools is not supported with prompt"),
        ({"messages": HI, "echo": True}, "echo is not supported with messages"),
        ({"messages": HI, "toolChoice": "auto"}, "did you mean 'tool_choice'"),
    ):
        found = parse({"id": 1, **beside})
        assert isinstance(found, Completion)
        assert found.error is not None
        assert part in found.error["message"]
    assert isinstance(parse({"id": 1, "prompt": "hi", "tools": [], "tool_choice": "auto"}), Request)


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
def test_fields_without_effect_pass_and_the_endpoint_is_known(url):
    body = {
        "prompt" if url == "/v1/completions" else "messages": "hi" if "chat" not in url else HI,
        "model": "m",
        "user": "u",
        "store": True,
        "service_tier": "flex",
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "stream": False,
        "stream_options": {"include_usage": True},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    found = parse({"custom_id": "a", "method": "POST", "url": url, "body": body})
    assert isinstance(found, Request), found
    assert found.endpoint == url
