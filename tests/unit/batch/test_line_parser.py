"""Lines of a batch input, form by form; a bad line becomes an error record, never an exception."""

import json
from types import SimpleNamespace

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.input.pending import Line
from engine.batch.line_parser import LineParser
from engine.config import SamplingConfig
from engine.request import Completion, Request


class Letters:
    """A tokenizer: one token per character, its code point. 1 in front is the BOS."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        if "\x07" in text:  # what the tokenizers library raises has no type of its own
            raise Exception("TokenizerException: unknown token")
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 256 for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        if messages[0]["role"] == "martian":
            raise LookupError("no martians")
        return "".join(f"{message['role']}:{message['content']}|" for message in messages)


def parser(**changes) -> LineParser:
    given = {
        "sampling": SamplingConfig(max_new_tokens=16, temperature=0.5, seed=3),
        "tokenizer": Letters(),
        "vocab_size": 256,
        "max_model_len": 32,
    }
    return LineParser(**(given | changes))


def parse(record, **changes) -> Request | Completion:
    raw = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parser(**changes)(Line(7, 12, raw + b"\n"))


def request(record, **changes) -> Request:
    parsed = parse(record, **changes)
    assert isinstance(parsed, Request), parsed
    return parsed


def message(record, **changes) -> str:
    """The error of a line, checked for what every error record has."""
    parsed = parse(record, **changes)
    assert isinstance(parsed, Completion), parsed
    assert (parsed.index, parsed.finish_reason, parsed.text, parsed.token_ids) == (
        7,
        "error",
        "",
        [],
    )
    assert parsed.error is not None and parsed.error["line"] == 12
    return parsed.error["message"]


def test_a_prompt_is_tokenized_as_the_tokenizer_does_by_itself():
    parsed = request({"id": "a", "prompt": "ab"})
    assert (parsed.index, parsed.id) == (7, "a")
    assert list(parsed.prompt_token_ids) == [1, 97, 98]
    assert parsed.params.max_new_tokens == 16 and parsed.params.temperature == 0.5


def test_token_ids_are_taken_as_they_are():
    assert list(request({"id": 1, "prompt_token_ids": [5, 255]}).prompt_token_ids) == [5, 255]
    assert request({"id": 1, "prompt_token_ids": [5]}, tokenizer=None).id == 1


def test_messages_go_through_the_chat_template_without_a_second_bos():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    parsed = request(
        {"id": 1, "messages": [{"role": "s", "content": "x"}, {"role": "u", "content": parts}]}
    )
    assert bytes(parsed.prompt_token_ids) == b"s:x|u:hi|"


def test_openai_completion_line():
    body = {"model": "m", "prompt": "a", "max_tokens": 4, "temperature": 0, "stop": "x", "n": 1}
    line = {"custom_id": "r-1", "method": "POST", "url": "/v1/completions", "body": body}
    parsed = request(line)
    assert parsed.id == "r-1" and list(parsed.prompt_token_ids) == [1, 97]
    assert (parsed.params.max_new_tokens, parsed.params.temperature) == (4, 0)
    assert parsed.params.stop == ("x",) and parsed.params.seed == 3
    body["prompt"] = [5, 6]
    assert list(request(line).prompt_token_ids) == [5, 6]


def test_openai_chat_line():
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 0,
        "stream": False,
        "response_format": {"type": "text"},
        "seed": None,
    }
    parsed = request({"custom_id": "r", "url": "/v1/chat/completions", "body": body})
    assert bytes(parsed.prompt_token_ids) == b"user:a|"
    assert parsed.params.max_new_tokens == 4 and parsed.params.logprobs and parsed.params.seed == 3


@pytest.mark.parametrize(
    "settings, name, value",
    [
        ({"max_new_tokens": 3}, "max_new_tokens", 3),
        ({"max_tokens": 3}, "max_new_tokens", 3),
        ({"max_new_tokens": None}, "max_new_tokens", 16),
        ({"top_k": 5, "temperature": 1}, "top_k", 5),
        ({"stop": ["x", "y"]}, "stop", ("x", "y")),
        ({"stop_token_ids": [3]}, "stop_token_ids", (3,)),
        ({"logprobs": True}, "logprobs", True),
        ({"logprobs": 1}, "logprobs", True),
        ({"logprobs": 3}, "top_logprobs", 3),
        ({"echo": True}, "echo", True),
        ({"prompt_logprobs": True}, "prompt_logprobs", True),
        ({"ignore_eos": True}, "ignore_eos", True),
    ],
)
def test_a_line_overrides_sampling_by_our_names_and_openais(settings, name, value):
    assert getattr(request({"id": 1, "prompt": "a", **settings}).params, name) == value


def test_keys_of_the_users_own_are_ignored():
    own = {"task": "sum", "answer": 42, "steps": 3, "speed": 1, "meta": {"n": 2}, "source": "x"}
    assert isinstance(request({"id": 1, "prompt": "a", **own}), Request)


@pytest.mark.parametrize(
    "key, meant",
    [
        ("max_new_token", "max_new_tokens"),
        ("maxNewTokens", "max_new_tokens"),
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("topP", "top_p"),
        ("prompt_logprob", "prompt_logprobs"),
    ],
)
def test_a_misspelt_setting_is_an_error_with_the_nearest_name(key, meant):
    assert f"did you mean '{meant}'" in message({"id": 1, "prompt": "a", key: 1})


@pytest.mark.parametrize(
    "record, part",
    [
        ({"prompt": "a"}, "the line has no id"),
        ({"id": 1.5, "prompt": "a"}, "id = 1.5: must be text or a whole number"),
        ({"id": True, "prompt": "a"}, "id = true: must be"),
        ({"id": 1}, "the line has no prompt"),
        ({"id": 1, "prompt": None}, "the line has no prompt"),
        ({"id": 1, "prompt": "a", "messages": []}, "the line has prompt and messages"),
        ({"id": 1, "prompt": ""}, "prompt: is empty"),
        ({"id": 1, "prompt": 5}, "prompt = 5: must be text"),
        ({"id": 1, "prompt": ["a", 3]}, "prompt[1] = 3: must be text or a list of token ids"),
        ({"id": 1, "prompt": "\ud800"}, "half of a surrogate pair"),
        ({"id": 1, "prompt_token_ids": []}, "prompt_token_ids: is empty"),
        ({"id": 1, "prompt_token_ids": "ab"}, "must be a list of token ids"),
        (
            {"id": 1, "prompt_token_ids": [1, 256]},
            "prompt_token_ids[1] = 256: must be from 0 to 255",
        ),
        ({"id": 1, "prompt_token_ids": [-1]}, "[0] = -1: must be from 0"),
        ({"id": 1, "prompt_token_ids": [True]}, "[0] = true: must be a whole number"),
        ({"id": 1, "prompt_token_ids": [1.0]}, "[0] = 1.0: must be a whole number"),
        ({"id": 1, "messages": []}, "must be a list of messages, not empty"),
        ({"id": 1, "messages": [{"content": "a"}]}, "messages[0] ="),
        ({"id": 1, "messages": [{"role": "u", "content": None}]}, "messages[0].content = null"),
        (
            {"id": 1, "messages": [{"role": "u", "content": [{"type": "image_url"}]}]},
            "only parts of type text",
        ),
        ({"id": 1, "messages": [{"role": "martian", "content": ""}]}, "refuses them: no martians"),
        ({"id": 1, "prompt": "a", "temperature": -1}, "temperature = -1: must be"),
        ({"id": 1, "prompt": "a", "temperature": 10**400}, "must be finite"),
        ({"id": 1, "prompt": "a", "top_p": "x"}, "top_p = 'x': must be"),
        ({"id": 1, "prompt": "a", "max_tokens": 1.5}, "max_new_tokens = 1.5: must be"),
        ({"id": 1, "prompt": "a", "max_tokens": 1, "max_new_tokens": 2}, "give one of them"),
        ({"id": 1, "prompt": "a", "n": 0}, "n = 0: must be from 1 to 128"),
        ({"id": 1, "prompt": "a", "n": 2, "best_of": 3}, "best_of = 3: best_of above n = 2"),
        ({"id": 1, "prompt": ["a"] * 17, "n": 128}, "17 prompts and n = 128 are 2176 completions"),
        ({"id": 1, "prompt": [[3], [1, -1]]}, "prompt[1][1] = -1: must be from 0"),
        ({"id": 1, "prompt": "a", "stream": True}, "stream is not supported"),
        ({"id": 1, "prompt": "a", "suffix": "x"}, "suffix is not supported"),
        ({"id": 1, "prompt": "a", "logprobs": 5.0}, "logprobs = 5.0: must be true or false"),
        (b"{", "is not valid JSON"),
        (b"hello", "is not valid JSON"),
        (b"[1, 2]", "[1, 2]: must be a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": 1, "prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"id": 1, "prompt": "a", "prompt": "b"}', "the key 'prompt' is given twice"),
        (b'{"id": 1, "prompt": "\xff"}', "is not valid UTF-8 at byte 21"),
        (b'{"id": 1, "seed": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_error_records_of_bad_lines_name_what_is_wrong(record, part):
    assert part in message(record)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"method": "GET"}, 'method = "GET": must be POST'),
        ({"url": "/v1/embeddings"}, "url ="),
        ({"url": ["x"]}, "url ="),
        ({"body": None}, "body = null: must be an object"),
        ({"body": [1]}, "body = [1]: must be an object"),
        ({"id": "b"}, "both id and custom_id"),
        ({"body": {"messages": [{"role": "u", "content": "a"}]}}, "body.messages is not supported"),
        ({"body": {"prompt": "a", "top_logprobs": 5}}, "top_logprobs = 5: needs logprobs: true"),
        (
            {
                "url": "/v1/chat/completions",
                "body": {"messages": [{"role": "user", "content": "a"}], "logprobs": 5},
            },
            "logprobs = 5: must be true or false with messages",
        ),
        ({"body": {"prompt": "a", "tools": [{}]}}, "tools is not supported"),
        ({"body": {"prompt": "a", "bananas": 1}}, "body.bananas is not supported"),
        ({"body": {"prompt": "a", "max_token": 1}}, "did you mean 'max_tokens'"),
        ({"body": {}}, "the line has no prompt"),
        ({"custom_id": None}, "custom_id = null: must be text"),
    ],
)
def test_bad_openai_lines_name_the_field(changes, part):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
    assert part in message(line | changes)


def test_a_prompt_must_leave_room_for_one_token():
    assert request({"id": 1, "prompt_token_ids": [2] * 31}).id == 1
    parsed = parse({"id": 1, "prompt_token_ids": [2] * 32})
    assert isinstance(parsed, Completion) and parsed.prompt_tokens == 32
    text = message({"id": 1, "prompt_token_ids": [2] * 40})
    assert "40 tokens" in text and "holds 32" in text


def test_a_prompt_that_asks_for_no_new_token_may_fill_the_context():
    line = {"id": 1, "prompt_token_ids": [2] * 32, "max_new_tokens": 0}
    assert len(request(line).prompt_token_ids) == 32


def test_a_repeated_id_names_the_first_line():
    line = Line(7, 12, b'{"id": "a", "prompt": "x"}', duplicate_of=3)
    parsed = parser()(line)
    assert isinstance(parsed, Completion) and parsed.error is not None
    assert parsed.id == "a" and "on line 3" in parsed.error["message"]


@pytest.mark.parametrize(
    "record, part",
    [
        ({"id": 1, "prompt": "a"}, "prompt: needs a tokenizer"),
        ({"id": 1, "messages": [{"role": "u", "content": "a"}]}, "no chat template"),
        ({"id": 1, "prompt_token_ids": [1], "stop": "x"}, "needs a tokenizer"),
    ],
)
def test_text_without_a_tokenizer_is_an_error(record, part):
    assert part in message(record, tokenizer=None)


def test_messages_without_a_chat_template_are_an_error():
    line = {"id": 1, "messages": [{"role": "u", "content": "a"}]}
    assert "no chat template" in message(line, tokenizer=SimpleNamespace(chat_template=None))


def test_a_broken_line_keeps_the_id_it_begins_with():
    parsed = parse(b'{"id": "a", "prompt": "b')
    assert parsed.id == "a"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
keys = st.sampled_from(
    ["id", "custom_id", "prompt", "prompt_token_ids", "messages", "body", "url", "method", "stop"]
    + ["max_tokens", "max_new_tokens", "temperature", "logprobs", "n", "stream", "top_logprobs"]
)


@given(record=st.dictionaries(keys, values | st.dictionaries(keys, values, max_size=4)))
def test_no_line_of_json_raises(record):
    parsed = parse(record)
    assert json.dumps(parsed.record() if isinstance(parsed, Completion) else parsed.id)


@given(raw=st.binary(max_size=40))
def test_no_line_of_bytes_raises(raw):
    assert isinstance(parse(raw), Completion)


class Added(Letters):
    """Has more tokens than the model: of text beyond Latin-1 the whole code point."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}


def test_text_whose_token_is_past_the_embedding_is_an_error_that_names_both():
    text = message({"id": 1, "prompt": "ab\u0180"}, tokenizer=Added())
    assert text.startswith("prompt: its token 2 has the id 384") and "0 to 255" in text
    assert "model.tokenizer" in text
    chat = [{"role": "u", "content": "\u0180"}]
    assert "messages: " in message({"id": 1, "messages": chat}, tokenizer=Added())


class Unknown(Letters):
    """A tokenizer without an unknown token: what it does not know has no id."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [5, None]}


def test_text_that_has_no_token_id_is_an_error():
    assert "token 1 " in message({"id": 1, "prompt": "ab"}, tokenizer=Unknown())


def test_whatever_a_tokenizer_raises_is_the_record_of_the_line():
    text = message({"id": 1, "prompt": "a\x07"})
    assert text == "prompt: the tokenizer cannot encode it: TokenizerException: unknown token"
    chat = [{"role": "u", "content": "\x07"}]
    assert message({"id": 1, "messages": chat}).startswith("messages: the tokenizer cannot encode")


class PanicException(BaseException):
    """As a panic of the Rust code inside a tokenizer arrives: no Exception."""


class Panics(Letters):
    def __call__(self, text, add_special_tokens=True):
        raise PanicException("index out of bounds")


class Interrupted(Letters):
    def __call__(self, text, add_special_tokens=True):
        raise KeyboardInterrupt


def test_a_panic_of_the_tokenizer_is_the_record_of_the_line_and_an_interrupt_is_not():
    assert "index out of bounds" in message({"id": 1, "prompt": "a"}, tokenizer=Panics())
    with pytest.raises(KeyboardInterrupt):
        parse({"id": 1, "prompt": "a"}, tokenizer=Interrupted())


class Recursive(Letters):
    """A template that walks into what is nested."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return self.apply_chat_template(messages, tokenize, add_generation_prompt)


def test_a_template_without_end_is_the_record_of_the_line():
    chat = [{"role": "u", "content": "a"}]
    assert "recursion" in message({"id": 1, "messages": chat}, tokenizer=Recursive())


class NoTemplate(Letters):
    @property
    def chat_template(self):
        raise RuntimeError("several templates and none is the default")


def test_whatever_is_raised_anywhere_is_the_record_of_the_line():
    chat = [{"role": "u", "content": "a"}]
    text = message({"id": 1, "messages": chat}, tokenizer=NoTemplate())
    assert text.startswith("the line cannot be read: RuntimeError: several templates")


class NoText(Letters):
    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return None


def test_a_template_that_renders_nothing_is_the_record_of_the_line():
    class Silent(Letters):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return ""

    line = {"id": 1, "messages": [{"role": "user", "content": "a"}]}
    text = message(line, tokenizer=Silent())
    assert text.startswith("messages: the tokenizer's chat template makes no text of them")


def test_a_template_that_does_not_compile_is_said_with_its_line():
    class Broken(Letters):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            jinja2.Environment().from_string("{{ a }}\n{% for m in messages %}")

    line = {"id": 1, "messages": [{"role": "user", "content": "a"}]}
    text = message(line, tokenizer=Broken())
    assert text.startswith("messages: the tokenizer's chat template does not compile (line 2: Unex")
    assert "correct chat_template.jinja, or chat_template in tokenizer_config.json" in text


def test_a_template_that_gives_no_text_is_the_record_of_the_line():
    chat = [{"role": "u", "content": "a"}]
    assert "messages: " in message({"id": 1, "messages": chat}, tokenizer=NoText())


@pytest.mark.parametrize(
    "around",
    [
        '{"id": 1, "prompt": %s}',
        '{"id": 1, "prompt_token_ids": %s}',
        '{"id": 1, "prompt": "a", "stop": %s}',
        '{"id": 1, "prompt": "a", "temperature": %s}',
        '{"id": 1, "prompt": "a", "logit_bias": %s}',
        '{"id": 1, "messages": [{"role": "u", "content": "a", "x": %s}]}',
        '{"id": 1, "messages": [{"role": "u", "content": %s}]}',
        '{"id": 1, "messages": %s}',
        '{"custom_id": "a", "body": {"prompt": %s}}',
        '{"custom_id": "a", "body": %s}',
        '{"custom_id": "a", "url": %s, "body": {"prompt": "a"}}',
        '{"custom_id": "a", "method": %s, "body": {"prompt": "a"}}',
        '{"id": %s, "prompt": "a"}',
        "%s",
    ],
)
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": [', "]}")])
def test_no_depth_of_nesting_raises(around, opening, closing):
    # Around the depth at which reading and printing JSON give up, which differs.
    for depth in [*range(60, 1100, 7), 5000, 100_000]:
        parsed = parse((around % (opening * depth + "1" + closing * depth)).encode())
        assert isinstance(parsed, Completion | Request)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([3, 4], [[3, 4]]),
        ([[3, 4]], [[3, 4]]),
        (["a", [3, 4]], [[1, 97], [3, 4]]),
        (["a", "b"], [[1, 97], [1, 98]]),
    ],
)
def test_a_list_of_prompts_is_one_request_with_a_choice_per_prompt(prompt, expected):
    parsed = parse({"id": 1, "prompt": prompt})
    assert isinstance(parsed, Request)
    assert [list(each.prompt_token_ids) for each in parsed.choices] == expected
    assert [each.choice for each in parsed.choices] == list(range(len(expected)))


def test_choices_of_a_line_are_prompt_after_prompt():
    parsed = parse({"id": 1, "prompt": ["a", "b"], "n": 2, "best_of": 2, "echo": True})
    assert isinstance(parsed, Request)
    found = [(each.choice, each.prompt_token_ids[1], each.prompt_text) for each in parsed.choices]
    assert found == [(0, 97, "a"), (1, 97, "a"), (2, 98, "b"), (3, 98, "b")]
    assert len({each.key for each in parsed.choices}) == 4
    assert parsed.key == parsed.index
