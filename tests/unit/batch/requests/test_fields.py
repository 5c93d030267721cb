"""The tables of fields. Run: pytest tests/unit/batch/requests/test_fields.py"""

from dataclasses import fields

import pytest

from engine.batch.requests.chat import CHAT_FIELDS
from engine.batch.requests.fields import (
    SETTINGS,
    ChatBody,
    CommonFields,
    CompletionBody,
    OwnLine,
    check_fields,
)
from engine.request import RequestError, SamplingParams

EDGES = [
    ("max_new_tokens", [0, 1], [-1, 1.5, True, "1"]),
    ("temperature", [0, 0.7, 10**30], [-0.1, True, "1"]),
    ("top_p", [0.001, 1], [0, 1.01]),
    ("top_k", [-1, 0, 40], [-2, 1.0]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.01, 100], [0, 101]),
    ("logit_bias", [{}, {"3": -100}], [{"3": 101}, [3], {"3": "1"}]),
    ("n", [1, 128], [0, 129, True]),
    ("stop", ["a", ["a", "b", "c", "d", "e"]], [3, [3]]),
    ("stop_token_ids", [[], [0]], [[-1], ["a"], 3]),
    ("ignore_eos", [True, False], [1, "yes"]),
    ("min_tokens", [0, 5], [-1, 1.5]),
    ("logprobs", [True, False, 0, 100], [-1, 101, "5"]),
    ("prompt_logprobs", [True, False, 0, 100], [-1, 101, 5.0]),
    ("seed", [0, 2**63 - 1], [2**63, 1.5]),
    ("echo", [True, False], [1]),
]


@pytest.mark.parametrize(("name", "right", "wrong"), EDGES)
def test_a_table_accepts_what_sampling_params_accept(name, right, wrong):
    for value in right:
        check_fields(OwnLine, {name: value})
        SamplingParams(**{name: value})
    for value in wrong:
        with pytest.raises(RequestError, match=f"^{name} = ") as caught:
            check_fields(OwnLine, {name: value})
        assert caught.value.code == "invalid_value"
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})


def test_a_table_has_every_sampling_parameter():
    assert {each.name for each in fields(SamplingParams)} <= SETTINGS
    assert {name for name, _, _ in EDGES} <= SETTINGS


def test_each_body_has_the_fields_of_its_endpoint_alone():
    chat, completion = set(ChatBody.model_fields), set(CompletionBody.model_fields)
    assert chat - completion == CHAT_FIELDS | {"messages"}
    assert completion - chat == {"prompt", "echo"}
    assert set(CommonFields.model_fields) <= chat & completion


def test_fields_without_effect_are_of_any_type_and_null_leaves_any_out():
    check_fields(ChatBody, {"user": 3, "metadata": [], "store": "x", "n": None, "tools": None})
