"""Only what the JSON standard allows is read, and every error names what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.strict_json import parse_object, show

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), values))
def test_every_object_reads_back(record):
    assert parse_object(json.dumps(record).encode()) == record


@pytest.mark.parametrize(
    "raw, part",
    [
        (b"", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "Extra data at character 9"),
        (b'{"a": 1, "a": 1}', "the key 'a' is given twice"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
        (b'{"a": Infinity}', "Infinity is no JSON number"),
        (b'{"a": "\xc3"}', "not valid UTF-8 at byte 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'"a"', '"a": must be a JSON object'),
        (b"null", "null: must be a JSON object"),
    ],
)
def test_what_is_refused_and_how(raw, part):
    with pytest.raises(ValueError) as error:
        parse_object(raw)
    assert part in str(error.value)


def test_a_long_value_is_shown_shortened():
    assert show({"a": 1}) == '{"a": 1}'
    assert show("x" * 100) == '"' + "x" * 56 + "..."
