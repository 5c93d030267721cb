"""What the bytes of a record tell without parsing them: its form, whether it is an error, its line.

The ledger holds records of both forms, also those that older versions wrote.
"""

from __future__ import annotations

import re

# How OpenAI's form begins: `openai_form.py` writes nothing else. The id has the job's number and
# the line's index.
_OPENAI = re.compile(
    rb'\{"id":"batch_req_([0-9a-f]{16})([0-9a-f]{8,16})",'
    rb'"custom_id":(?:"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+|null),"response":(\{"status_code":200,)?'
)
# Inside of a JSON string the quotes would be escaped. Older versions wrote a space.
_OWN_ERROR = (b'"finish_reason":"error"', b'"finish_reason": "error"')


def is_error(body: bytes) -> bool:
    """Return whether a record, as JSON of the output, is an error record."""
    if match := _OPENAI.match(body):
        return match[3] is None
    return any(mark in body for mark in _OWN_ERROR)


def line_of(body: bytes) -> tuple[str, int] | None:
    """Return the job's number and the line's index of a record in OpenAI's form, else None."""
    match = _OPENAI.match(body)
    return None if match is None else (match[1].decode(), int(match[2], 16))
