"""docs/compatibility.md: the page is current, and has the claims of the tests alone."""

from __future__ import annotations

import compatibility_docs


def test_the_page_is_generated_from_the_current_tests():
    assert compatibility_docs.main(["--check"]) == 0, "run `python tools/compatibility_docs.py`"


def test_a_row_is_the_name_of_a_test(tmp_path):
    file = tmp_path / "test_x.py"
    file.write_text("def helper(): ...\n\n\ndef test_a_line_of_1_byte_is_read(x): ...\n")
    assert list(compatibility_docs.claims(file)) == ["a line of 1 byte is read"]
