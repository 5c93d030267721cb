"""Placement files: what is read is what was written, and what is said where one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.validation import ConfigError
from engine.moe.placement.placement import LayerPlacement, Placement, PlannedLoads
from engine.moe.placement.placement_file import (
    FORMAT,
    digest,
    parse_placement,
    read_placement,
    to_data,
    write_placement,
)

PLACEMENT = Placement(
    2,
    4,
    {
        0: LayerPlacement((0, 1, 0, 1), ((), (), (), (0,))),
        2: LayerPlacement((0, 0, 1, 1), ((),) * 4),
    },
    "int4",
    "0123abcd",
    {"text": PlannedLoads(0.97, {0: 0.95, 2: 0.99}, {0: (9, 8, 7, 6), 2: (1, 2, 3, 4)})},
    (1.0, 1.5),
)


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_a_file_reads_as_it_was_written(name, tmp_path):
    write_placement(PLACEMENT, tmp_path / name)
    assert read_placement(tmp_path / name) == PLACEMENT


def test_the_digest_is_of_where_rows_are_computed_and_not_of_the_plan(tmp_path):
    data = to_data(PLACEMENT)
    del data["domains"], data["model"]
    same = parse_placement(json.loads(json.dumps(data)), "x")
    assert digest(same) == digest(PLACEMENT)
    for key, value in {"precision": "int8", "row_times": [1.0, 2.0]}.items():
        assert digest(parse_placement({**data, key: value}, "x")) != digest(PLACEMENT)


def changed(**keys: Any) -> dict[str, Any]:
    return {**to_data(PLACEMENT), **keys}


WRONG: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "format = 'list'"),
    "another format": (changed(format="x"), f"must be {FORMAT}"),
    "an unknown key": (changed(rank=2), "unknown key 'rank'"),
    "no ranks": (changed(ranks=0), "ranks = 0: must be a whole number of at least 1"),
    "a precision": (changed(precision="int2"), "precision = 'int2': must be one of model, int8"),
    "a layer's name": (changed(layers={"a": {}}), "layers: the key 'a' must be a whole number"),
    "too few homes": (changed(layers={0: {"homes": [0]}}), "layers.0.homes = [0]: must be 4 ranks"),
    "a rank too high": (changed(layers={0: {"homes": [0, 0, 1, 2]}}), "expert 3 is on rank 2"),
    "an idle rank": (changed(layers={0: {"homes": [0] * 4}}), "rank 1 is the home of no expert"),
    "a copy at home": (
        changed(layers={0: {"homes": [0, 0, 1, 1], "copies": {0: [0]}}}),
        "expert 0 is twice on one rank",
    ),
    "a copy of no expert": (
        changed(layers={0: {"homes": [0, 0, 1, 1], "copies": {4: [0]}}}),
        "layers.0.copies.4 = [0]",
    ),
    "row times": (changed(row_times=[1.0]), "row_times = [1.0]: must be 2 numbers above 0"),
    "a domain": (changed(domains={"text": 3}), "domains.text: must have a share and layers"),
    "a domain's rows": (
        changed(domains={"text": {"share": 1, "layers": {0: {"share": 1, "rows": [1]}}}}),
        "domains.text.layers.0: must have a share and rows of 4 experts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named_with_its_key_and_value(case):
    data, text = WRONG[case]
    with pytest.raises(ConfigError) as error:
        parse_placement(data, "dir/p.yaml")
    assert text in str(error.value)
    assert str(error.value).startswith("moe.placement: the file dir/p.yaml: ")


def test_a_file_that_is_no_yaml_or_json_is_refused(tmp_path):
    for name, text in (("p.yaml", "a: [1"), ("p.json", "{"), ("q.json", yaml.safe_dump({"a": 1}))):
        path: Path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"is not {path.suffix[1:].upper()}"):
            read_placement(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_placement(tmp_path / "binary.yaml")
