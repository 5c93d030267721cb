"""tools/bench_records.py: a row per form, then one JSON line."""

from __future__ import annotations

import json

import bench_records
import pytest


def test_it_prints_a_row_per_form_and_one_json_line(capsys):
    bench_records.main(["--records", "2", "--tokens", "5"])
    *table, line = [text for text in capsys.readouterr().out.splitlines() if text]
    record = json.loads(line)
    assert [row["form"] for row in record["rows"]] == list(bench_records._FORMS)
    assert len(table) == 2 + len(record["rows"])
    assert all(row["written"]["min"] > 0 and row["bytes"] > 100 for row in record["rows"])


@pytest.mark.parametrize("option", ["--tokens=-1", "--records=0", "--records=x"])
def test_numbers_that_measure_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        bench_records.main([option])
    assert "must be a whole number, at least 1" in capsys.readouterr().err
