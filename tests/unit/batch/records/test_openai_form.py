"""OpenAI's form: the official package's types take every line; numbers and texts by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import openai.types as types
import openai.types.chat as chat_types
import pytest
from openai.types.shared import ErrorObject
from tokenizers import Tokenizer, decoders, models

from engine.batch.records.marks import is_error, line_of
from engine.batch.records.openai_form import OpenAIRecords
from engine.request import CapacityUse, Completion, Request, RequestError, SamplingParams

JOB = "0123456789abcdef"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# Byte-level: Ġ is a space, Ã and ĥ are the two bytes of é... as names of tokens.
WORDS = ["a", "Ġthe", "Ã", "©", 'Ġquote"', "b", "<end>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocab = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


def completion(endpoint: Any = CHAT, **values: Any) -> Completion:
    ids = values.pop("token_ids", [1, 2, 3, 5])
    request = Request(index=3, id="x", prompt_token_ids=[0, 1], endpoint=endpoint)
    defaults = {"id": "x", "text": " theéb", "finish_reason": "stop", "prompt_tokens": 2}
    return Completion(
        index=3,
        token_ids=ids,
        completion_tokens=len(ids),
        **{"request": request, **defaults, **values},
    )


def parsed(line: bytes) -> Any:
    """Return the body, or the error, as the official package has it; its types are checked."""
    record = json.loads(line)
    assert list(record) == ["id", "custom_id", "response", "error"]
    if record["response"] is None:
        assert isinstance(record["error"]["code"], str) and record["error"]["message"]
        return types.BatchError.model_validate(record["error"], strict=True)
    assert record["error"] is None
    response = record["response"]
    assert isinstance(response["request_id"], str)
    body = response["body"]
    if response["status_code"] != 200:
        assert response["status_code"] == 400
        return ErrorObject.model_validate(body["error"], strict=True)
    is_chat = body["object"] == "chat.completion"
    model = chat_types.ChatCompletion if is_chat else types.Completion
    return model.model_validate(body, strict=True)


def test_a_chat_is_a_whole_chat_completion_with_the_account_beside_it(tokenizer):
    capacity = CapacityUse(assignments=8, dropped=2, mass=4, mass_kept=3)
    done = completion(capacity=capacity, cached_tokens=1)
    line = OpenAIRecords(JOB, 17, "model", tokenizer)(done)
    assert json.loads(line) == {
        "id": f"batch_req_{JOB}00000003",
        "custom_id": "x",
        "response": {
            "status_code": 200,
            "request_id": f"req_{JOB}00000003",
            "body": {
                "id": f"chatcmpl-{JOB}00000003",
                "object": "chat.completion",
                "created": 17,
                "model": "model",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": " theéb", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": None,
                    }
                ],
                "usage": {
                    "prompt_tokens": 2,
                    "completion_tokens": 4,
                    "total_tokens": 6,
                    "prompt_tokens_details": {"cached_tokens": 1},
                },
                "lockstep": {
                    "capacity": {
                        "assignments": 8,
                        "dropped": 2,
                        "added": 0,
                        "gate_mass_kept": 0.75,
                    }
                },
            },
        },
        "error": None,
    }
    assert parsed(line).choices[0].message.content == " theéb"
    assert not is_error(line) and line_of(line) == (JOB, 3)


@pytest.mark.parametrize("endpoint", [CHAT, TEXT])
@pytest.mark.parametrize("with_top", [False, True])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_official_types_take_bodies_with_log_probabilities(
    endpoint, with_top, with_tokenizer, tokenizer
):
    top = [[(1, -0.5), (2, -1.0)], [(2, -0.25)], [], [(5, -math.inf), (0, -2.0)]]
    done = completion(
        endpoint,
        logprobs=[-0.5, -0.25, math.nan, -math.inf],
        top_logprobs=top if with_top else None,
    )
    line = OpenAIRecords(JOB, 1, "m", tokenizer if with_tokenizer else None)(done)
    logprobs = parsed(line).choices[0].logprobs
    if endpoint == CHAT:
        assert [each.logprob for each in logprobs.content] == [-0.5, -0.25, -9999.0, -9999.0]
        found = [[each.logprob for each in entry.top_logprobs] for entry in logprobs.content]
        assert found == ([[-0.5, -1.0], [-0.25], [], [-9999.0, -2.0]] if with_top else [[]] * 4)
        texts = [entry.token for entry in logprobs.content]
    else:
        assert logprobs.token_logprobs == [-0.5, -0.25, -9999.0, -9999.0]
        assert (logprobs.top_logprobs is not None) == with_top
        texts = logprobs.tokens
    known = [" the", "\\xc3", "\\xa9", "b"]
    assert texts == (known if with_tokenizer else [f"token_id:{n}" for n in (1, 2, 3, 5)])


def test_tokens_of_a_chat_have_their_bytes_and_those_of_a_text_their_place(tokenizer):
    records = OpenAIRecords(JOB, 1, "m", tokenizer)
    top = [[(1, -1.0)]] * 4
    values = {"logprobs": [-1.0] * 4, "top_logprobs": top}
    content = parsed(records(completion(CHAT, **values))).choices[0].logprobs.content
    assert [entry.bytes for entry in content] == [[32, 116, 104, 101], [0xC3], [0xA9], [98]]
    assert content[1].top_logprobs[0].bytes == [32, 116, 104, 101]
    arrays = parsed(records(completion(TEXT, **values))).choices[0].logprobs
    assert arrays.text_offset == [0, 4, 5, 5]
    assert arrays.top_logprobs == [{" the": -1.0}] * 4
    stripped = parsed(records(completion(TEXT, text="theéb", **values))).choices[0].logprobs
    assert stripped.text_offset == [0, 3, 4, 4], "the first word lost its space"
    ended = completion(TEXT, token_ids=[5, 6], text="b", logprobs=[-1.0, -2.0])
    arrays = parsed(records(ended)).choices[0].logprobs
    assert arrays.tokens == ["b", "<end>"] and arrays.text_offset == [0, 1]


def test_of_candidates_that_are_written_alike_the_likeliest_counts(tokenizer):
    made = Tokenizer(models.BPE(vocab={"a": 0, "<0x61>": 1, "b": 2}, merges=[]))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    records = OpenAIRecords(JOB, 1, "m", made)
    top = [[(1, -0.5), (0, -1.0), (2, -2.0)]]
    done = completion(TEXT, token_ids=[0], text="a", logprobs=[-1.0], top_logprobs=top)
    assert parsed(records(done)).choices[0].logprobs.top_logprobs == [{"a": -0.5, "b": -2.0}]


def test_choices_of_one_prompt_count_it_once_and_their_capacity_is_added(tokenizer):
    first = completion(capacity=CapacityUse(assignments=4, dropped=1), cached_tokens=2)
    other = completion(text="b", capacity=CapacityUse(assignments=3), cached_tokens=2)
    first.request = replace(first.request, params=SamplingParams(n=2))
    other.request, own = replace(first.request, choice=1), other.request
    third = completion(TEXT, text="c", prompt_tokens=5)
    third.request = own
    first.others = [other, third]
    body = parsed(OpenAIRecords(JOB, 1, "m", tokenizer)(first))
    assert [choice.index for choice in body.choices] == [0, 1, 2]
    assert [choice.message.content for choice in body.choices] == [" theéb", "b", "c"]
    assert body.usage.prompt_tokens == 7 and body.usage.completion_tokens == 12
    assert body.usage.prompt_tokens_details.cached_tokens == 2
    assert body.lockstep["capacity"]["assignments"] == 7


@pytest.mark.parametrize("name", ["x", 7, None, 'q"u\\o', "\ud800", 10**30])
def test_a_refused_request_is_a_response_of_status_400(name):
    error = RequestError("invalid_value", f"temperature = {'x'}: \ud800")
    failed = Completion.failure(5, name, error, line=6)
    line = OpenAIRecords(JOB, 1, "m")(failed)
    found = parsed(line)
    assert (found.code, found.type, found.param) == ("invalid_value", "invalid_request_error", None)
    assert json.loads(line)["custom_id"] == name
    assert json.loads(line)["response"]["body"]["error"]["lockstep"] == {"line": 6}
    assert is_error(line) and line_of(line) == (JOB, 5)


@pytest.mark.parametrize("code", ["non_finite_logits", "decoding_failed"])
def test_what_the_engine_failed_has_no_response_and_keeps_what_there_was(code):
    error = {"code": code, "message": "why", "line": 4}
    failed = completion(finish_reason="error", error=error)
    line = OpenAIRecords(JOB, 1, "m")(failed)
    found = json.loads(line)["error"]
    assert parsed(line).code == code
    kept = {"line": 4, "text": " theéb", "token_ids": [1, 2, 3, 5]}
    assert found == {"code": code, "message": "why", "lockstep": kept}
    assert is_error(line)


def test_one_failed_choice_fails_the_line():
    first, other = completion(), completion()
    other.error = {"code": "invalid_value", "message": "why", "line": 4}
    first.others = [other]
    line = OpenAIRecords(JOB, 1, "m")(first)
    assert is_error(line) and parsed(line).code == "invalid_value"


@pytest.mark.parametrize("text", ["\ud800", '\x00\x1b"\\', "\u2028", "𝄞"])
@pytest.mark.parametrize("endpoint", [CHAT, TEXT, None])
def test_any_text_is_one_line_and_comes_back(text, endpoint):
    line = OpenAIRecords(JOB, 1, "m")(completion(endpoint, text=text, id=text))
    assert b"\n" not in line and not is_error(line)
    record = json.loads(line)
    choice = record["response"]["body"]["choices"][0]
    assert record["custom_id"] == text
    assert (choice["message"]["content"] if endpoint == CHAT else choice["text"]) == text


def test_a_tokenizer_that_fails_ends_nothing():
    class Broken:
        def decode(self, ids: Any, **options: Any) -> str:
            raise RuntimeError("panic")

    done = completion(logprobs=[-1.0] * 4)
    content = parsed(OpenAIRecords(JOB, 1, "m", Broken())(done)).choices[0].logprobs.content
    assert content[0].token == "token_id:1" and content[0].bytes is None
