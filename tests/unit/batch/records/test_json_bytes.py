"""JSON of records: what orjson refuses is written all the same, and marks hold for both forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from engine.batch.records.json_bytes import own_record, to_json
from engine.batch.records.marks import is_error, line_of
from engine.batch.strict_json import parse_object
from engine.request import Completion, Request, RequestError, SamplingParams


@pytest.mark.parametrize("text", ["é", "\ud800", "\udfff\ud800", "a\nb", "\x00", "𝄞", ""])
def test_any_text_comes_back(text):
    line = to_json({"text": text, text: [text]})
    assert b"\n" not in line and json.loads(line) == {"text": text, text: [text]}


@pytest.mark.parametrize("number", [0, -1, 2**63, 2**64, 10**400, 1.5, 1e-320, 1e308])
@pytest.mark.parametrize("beside", ["", "\ud800"])
def test_any_finite_number_comes_back(number, beside):
    assert json.loads(to_json([number, beside])) == [number, beside]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beside", ["", "\ud800"])
def test_what_is_no_number_is_null_which_the_strict_reader_takes(number, beside):
    line = to_json({"values": [number, (number,)], "text": beside})
    assert parse_object(line) == {"values": [None, [None]], "text": beside}


def test_numbers_and_arrays_of_numpy_are_pythons():
    for beside in ("", "\ud800"):
        value = [np.float64(0.5), np.float32(0.25), np.int64(3), np.array([1, 2]), beside]
        assert json.loads(to_json(value)) == [0.5, 0.25, 3, [1, 2], beside]


def completion(text: str = "", name: str = "a") -> Completion:
    return Completion(0, name, text, [1], "stop", prompt_tokens=1, completion_tokens=1)


MARK = '"finish_reason":"error"'


@pytest.mark.parametrize("text", [MARK, '"finish_reason": "error"', "\ud800" + MARK, f"\\{MARK}"])
def test_a_text_that_looks_like_an_error_is_none(text):
    for done in (completion(text), completion(name=text)):
        assert not is_error(own_record(done))
        assert not is_error(json.dumps(done.record()).encode())


def test_error_records_of_this_and_of_older_versions_are_told_apart_from_others():
    failed = Completion.failure(0, "\ud800", RequestError("invalid_value", "why"))
    assert is_error(own_record(failed))
    for ascii_only in (True, False):
        older = json.dumps(failed.record(), ensure_ascii=ascii_only)
        assert is_error(older.encode("utf-8", "surrogatepass"))


def test_a_record_of_our_own_form_has_no_line_number_whatever_its_id():
    for name in ("batch_req_0123456789abcdef00000003", "x"):
        assert line_of(own_record(completion(name=name))) is None


def test_a_line_of_several_choices_has_them_in_a_list_and_its_prompt_once():
    first, other = completion("x"), completion("y")
    asked = Request(index=0, id="a", prompt_token_ids=[7], params=SamplingParams(n=2))
    first.request, other.request = asked, replace(asked, choice=1)
    first.others = [other]
    record = json.loads(own_record(first))
    assert list(record) == ["id", "choices", "usage", "capacity"]
    assert record["usage"] == {"prompt_tokens": 1, "completion_tokens": 2}
    assert [each["text"] for each in record["choices"]] == ["x", "y"]
