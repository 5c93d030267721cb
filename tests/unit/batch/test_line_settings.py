"""Settings under other engines' names, in other places or misspelt; keys of the user's own."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from engine.batch.input.pending import Line
from engine.batch.line_parser import LineParser
from engine.config import SamplingConfig
from engine.request import Completion, ErrorCode, Request

ROOT = Path(__file__).resolve().parents[3]


class Letters:
    """A tokenizer: one token per character."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        if "\x07" in text:
            raise Exception("unknown token")
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if messages[0]["role"] == "martian":
            raise LookupError("no martians")
        return messages[0]["content"]


def parser(**changes: Any) -> LineParser:
    given = {"sampling": SamplingConfig(), "tokenizer": Letters(), "vocab_size": 256}
    return LineParser(**({"max_model_len": 32} | given | changes))


def parse(record: Any, **changes: Any) -> Request | Completion:
    raw = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parser(**changes)(Line(0, 1, raw + b"\n"))


def error(record: Any, **changes: Any) -> dict[str, Any]:
    parsed = parse(record, **changes)
    assert isinstance(parsed, Completion) and parsed.error is not None, parsed
    return parsed.error


def plain(**more: Any) -> dict[str, Any]:
    return {"id": 1, "prompt": "a", **more}


def openai(*, beside: Any = None, **body: Any) -> dict[str, Any]:
    url = "/v1/completions"
    return {"custom_id": "a", "url": url, "body": {"prompt": "a", **body}, **(beside or {})}


@pytest.mark.parametrize(
    ("key", "value", "write"),
    [
        # Objects in which other engines' requests have their settings.
        ("sampling_params", {}, "next to the prompt"),
        ("sampling_params", {"max_tokens": 5, "temperature": 1}, "max_tokens, temperature"),
        ("samplingParams", {"max_tokens": 5}, "next to the prompt: max_tokens"),
        ("parameters", {}, "next to the prompt"),
        ("parameters", {"max_new_tokens": 5}, "next to the prompt: max_new_tokens"),
        ("generation_config", {"do_sample": True}, "next to the prompt"),
        ("generationConfig", {"maxOutputTokens": 5}, "next to the prompt"),
        ("gen_kwargs", {"until": ["x"]}, "next to the prompt"),
        ("extra_body", {"top_k": 5}, "next to the prompt: top_k"),
        ("options", {"num_predict": 5}, "next to the prompt"),
        ("config", {"temperature": 1}, "next to the prompt: temperature"),
        # Other names of what there is.
        ("max_length", 50, "write max_new_tokens"),
        ("maxOutputTokens", 50, "write max_new_tokens"),
        ("max_tokens_to_sample", 50, "write max_new_tokens"),
        ("num_predict", 50, "write max_new_tokens"),
        ("stop_sequences", ["x"], "write stop"),
        ("stopSequences", ["x"], "write stop"),
        ("until", ["\n"], "write stop"),
        ("eos_token_id", 2, "write stop_token_ids"),
        ("random_seed", 3, "write seed"),
        ("temp", 0.7, "write temperature"),
        ("do_sample", False, "write temperature: 0"),
        ("return_logprob", True, "write logprobs"),
        ("system", "be kind", "write messages"),
        # What there is not.
        ("guided_json", {"type": "object"}, "leave it out"),
        ("guided_regex", "a+", "leave it out"),
        ("structured_outputs", {"json": {}}, "leave it out"),
        ("bad_words", ["x"], "leave it out"),
        ("logits_processors", ["x"], "leave it out"),
        ("no_repeat_ngram_size", 3, "leave it out"),
        ("num_beams", 4, "leave it out"),
        ("chat_template_kwarg", {"enable_thinking": False}, "did you mean 'chat_template_kwargs'"),
        ("enable_thinking", False, "write it in chat_template_kwargs"),
        ("skip_special_tokens", False, "leave it out"),
        ("lora_request", {"lora_name": "x"}, "leave it out"),
        ("presencePenalty", 0.5, "did you mean 'presence_penalty'"),
        ("typical_p", 0.9, "leave it out"),
        # Misspelt.
        ("max_new_tokns", 5, "did you mean 'max_new_tokens'"),
        ("Max-Tokens", 5, "did you mean 'max_tokens'"),
        ("temperatur", 1, "did you mean 'temperature'"),
        ("stop_token_id_s", [1], "did you mean 'stop_token_ids'"),
        ("repetition_penality", 1.2, "did you mean 'repetition_penalty'"),
        ("frequency_penalties", 1.2, "did you mean 'frequency_penalty'"),
        ("guided_jsn", {"type": "object"}, "leave it out"),
        ("samplng_params", {"n": 2}, "next to the prompt"),
    ],
)
def test_a_setting_of_another_engine_or_misspelt_is_refused_with_what_to_write(key, value, write):
    found = error(plain(**{key: value}))
    assert found["code"] == "unknown_setting"
    assert repr(key) in found["message"] and write in found["message"]
    assert key in error(openai(**{key: value}))["message"], "in an OpenAI body too"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guided_json", None),
        ("bad_words", []),
        ("num_beams", 1),
        ("no_repeat_ngram_size", 0),
        ("skip_special_tokens", True),
        ("use_beam_search", False),
        ("repetition_penalty", 1.0),
        ("chat_template_kwargs", {}),
        ("echo", False),
    ],
)
def test_an_unsupported_setting_whose_value_has_no_effect_is_accepted(key, value):
    assert isinstance(parse(plain(**{key: value})), Request)


# Columns of public data sets: none of them is a setting.
NAMES = """
    answer answers label labels category topic difficulty source metadata meta language level
    subject choices target targets reference references output outputs context question title
    url date author score rating split index idx type group domain expected expected_output
    ground_truth gold solution explanation hint tests test_list entry_point canonical_solution
    text length num_tokens prompt_length token_count history instruction input category_id
    task task_id documents passages priority details model response responses completion
    chosen rejected reward image audio regex pattern grammar tools_used steps speed stops
    created_at user_id session timestamp tags keywords summary body_text header style tone
    format template variables constraints rubric criteria max_points weight
"""
COLUMNS = dict.fromkeys(NAMES.split(), "x") | {
    "options": ["a", "b"],
    "parameters": "none",
    "until": 2020,
    "temp": 38.5,
}


def test_columns_of_the_users_own_are_no_settings_and_are_counted():
    counted = parser()
    line = Line(0, 1, json.dumps(plain(**COLUMNS)).encode())
    for _ in range(3):
        parsed = counted(line)
        assert isinstance(parsed, Request), parsed
    assert counted.user_keys.lines == dict.fromkeys(COLUMNS, 3)


def test_the_names_of_a_users_keys_that_are_kept_are_bounded():
    counted = parser()
    for start in range(0, 3000, 100):
        own = {f"k{number}" * 30: 1 for number in range(start, start + 100)}
        counted(Line(0, 1, json.dumps(plain(**own)).encode()))
    assert len(counted.user_keys.lines) <= 1001
    assert max(map(len, counted.user_keys.lines)) < 50
    assert sum(counted.user_keys.lines.values()) == 3000


@pytest.mark.parametrize(
    "beside", [{"max_tokens": 5}, {"temperature": 0}, {"maxTokens": 5}, {"guided_json": {"a": 1}}]
)
def test_a_setting_beside_an_openai_body_is_refused(beside):
    found = error(openai(beside=beside))
    assert found["code"] == "unknown_setting" and "write it in the body" in found["message"]


def test_keys_of_the_users_own_beside_an_openai_body_are_counted():
    counted = parser()
    counted(Line(0, 1, json.dumps(openai(beside={"answer": 4})).encode()))
    assert counted.user_keys.lines == {"answer": 1}


@pytest.mark.parametrize(
    ("key", "ours"),
    [("inputs", "prompt"), ("text", "prompt"), ("input_ids", "prompt_token_ids"),
     ("conversation", "messages")],
)  # fmt: skip
def test_a_prompt_under_another_name_is_refused_with_ours(key, ours):
    assert f"write {ours} instead of {key}" in error({"id": 1, key: "x"})["message"]


@pytest.mark.parametrize(
    ("key", "url", "ours"),
    [("promt", "/v1/completions", "prompt"), ("mesages", "/v1/chat/completions", "messages"),
     ("Messages", None, "messages"), ("prompt_token_id", None, "prompt_token_ids")],
)  # fmt: skip
def test_a_misspelt_prompt_of_a_body_is_refused_with_the_name_that_is_meant(key, url, ours):
    record = {"custom_id": "a", "body": {key: "x"}} | ({} if url is None else {"url": url})
    assert f"body.{key} is not supported: did you mean '{ours}'?" in error(record)["message"]


def test_of_a_line_of_many_unknown_keys_few_are_compared_with_every_name(monkeypatch):
    compared: list[str] = []

    def count(key, *rest, **options):
        compared.append(key)
        return []

    monkeypatch.setattr("engine.batch.line_settings.difflib.get_close_matches", count)
    parse(plain(**{f"column number {number}": 1 for number in range(200_000)}))
    assert 0 < len(compared) <= 2 * 256


def test_a_key_given_twice_among_many_is_found():
    many = ", ".join(f'"key{number}": 1' for number in range(200_000))
    assert "'key0' is given twice" in error(f"{{{many}, {many}}}".encode())["message"]


REFUSED: dict[str, Any] = {
    "invalid_json": b"{",
    "invalid_id": {"prompt": "a"},
    "invalid_request": {"id": 1},
    "invalid_prompt": plain(prompt=""),
    "invalid_messages": {"id": 1, "messages": []},
    "invalid_value": plain(temperature=-1),
    "unknown_setting": plain(max_length=5),
    "unsupported_setting": plain(suffix="x"),
    "conflicting_settings": plain(max_tokens=1, max_new_tokens=2),
    "chat_template_failed": {"id": 1, "messages": [{"role": "martian", "content": "a"}]},
    "tokenizer_failed": plain(prompt="\x07"),
    "token_out_of_range": plain(prompt="\u0180"),
    "context_length_exceeded": plain(prompt="a" * 40),
}


@pytest.mark.parametrize("code", REFUSED)
def test_every_refusal_of_a_line_has_its_code(code):
    assert error(REFUSED[code])["code"] == code


@pytest.mark.parametrize(
    ("code", "record", "changes"),
    [
        ("no_tokenizer", plain(), {"tokenizer": None}),
        ("no_tokenizer", {"id": 1, "prompt_token_ids": [1], "stop": "x"}, {"tokenizer": None}),
        (
            "no_chat_template",
            {"id": 1, "messages": [{"role": "u", "content": "a"}]},
            {"tokenizer": None},
        ),
        ("token_out_of_range", {"id": 1, "prompt_token_ids": [-1]}, {}),
        ("invalid_prompt", {"id": 1, "prompt_token_ids": "ab"}, {}),
        ("invalid_request", openai() | {"method": "GET"}, {}),
        ("unknown_setting", openai(bananas=1), {}),
        ("invalid_json", b'{"id": 1, "id": 2}', {}),
    ],
)
def test_refusals_of_one_kind_have_one_code(code, record, changes):
    assert error(record, **changes)["code"] == code


def test_a_repeated_id_has_its_code():
    parsed = parser()(Line(1, 2, json.dumps(plain()).encode(), duplicate_of=1))
    assert isinstance(parsed, Completion) and parsed.error is not None
    assert parsed.error["code"] == "duplicate_id"


def test_the_documentation_lists_every_code():
    text = (ROOT / "docs" / "batch.md").read_text()
    assert set(re.findall(r"^\| `([a-z_]+)` \| .*\|$", text, re.M)) >= set(get_args(ErrorCode))


class Slow(Letters):
    """Counts the characters that it is given."""

    def __init__(self):
        self.characters = 0

    def __call__(self, text, add_special_tokens=True):
        self.characters += len(text)
        return {"input_ids": [1] * len(text.replace(" ", ""))}


def test_a_text_far_longer_than_the_context_is_refused_by_its_beginning():
    tokenizer = Slow()
    found = error(plain(prompt="a" * 24_000_000), tokenizer=tokenizer)
    assert found["code"] == "context_length_exceeded"
    assert "24000000 characters" in found["message"] and "holds 32" in found["message"]
    assert tokenizer.characters < 2000


def test_a_long_text_of_few_tokens_is_run_whole():
    text = "a" + " " * 100_000 + "b"
    parsed = parse(plain(prompt=text), tokenizer=Slow())
    assert isinstance(parsed, Request) and len(parsed.prompt_token_ids) == 2
