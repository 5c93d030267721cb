"""Policy files: what is read is what was written, and what is said where one is wrong."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from engine.config import CapacityConfig
from engine.config.loader import parse_yaml
from engine.config.validation import ConfigError
from engine.moe.policy.policy import Expected, NamedPlacement, Policy
from engine.moe.policy.policy_file import (
    FORMAT,
    digest,
    parse_policy,
    placement_path,
    read_policy,
    to_data,
    write_policy,
)

DROP = CapacityConfig(policy="token_drop", factor="1.05", scope="rank")
POLICY = Policy(
    layers={
        0: DROP,
        2: CapacityConfig(
            policy="expanded_drop", factor="1.10", order="first", phases=("prefill", "decode")
        ),
        3: CapacityConfig(policy="token_drop", factor="inf"),
        5: CapacityConfig(),
    },
    placement=NamedPlacement("sub/p.yaml", "0123456789012345"),
    fingerprint="0123e4",
    data={"text.jsonl": "1e5", "tasks.jsonl": "ab"},
    ranks=4,
    expected=Expected(share=0.951, loss=7.1e-4, bound=9.8e-4, measure="kl"),
)


def test_a_file_reads_as_it_was_written(tmp_path):
    write_policy(POLICY, tmp_path / "p.yaml")
    assert read_policy(tmp_path / "p.yaml") == POLICY
    text = (tmp_path / "p.yaml").read_text()
    assert "0: {factor: 1.05, scope: rank}" in text


def test_a_factor_is_exactly_what_was_written(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text(f"format: {FORMAT}\nlayers: {{0: {{factor: 1.10000000000000000000001}}}}\n")
    assert read_policy(file).layer(0).exact_factor == Decimal("1.10000000000000000000001")


def test_a_layer_that_is_not_named_drops_nothing():
    assert POLICY.layer(1) == CapacityConfig()
    assert list(POLICY.limited) == [0, 2, 3]
    assert POLICY.summary == DROP
    assert Policy({}).summary.policy == "none"
    assert [POLICY.phases(i) for i in (0, 1, 2)] == [("prefill",), (), ("prefill", "decode")]


def test_the_digest_is_of_what_decides_results_and_not_of_what_was_measured():
    same = replace(POLICY, expected=None, data={}, fingerprint=None, ranks=None)
    assert digest(same) == digest(POLICY)
    layers = {**POLICY.layers, 0: replace(DROP, factor="1.050"), 7: CapacityConfig()}
    assert digest(replace(same, layers=layers)) == digest(POLICY)
    moved = NamedPlacement("elsewhere.yaml", POLICY.placement.digest)  # pyright: ignore
    assert digest(replace(same, placement=moved)) == digest(POLICY)
    for other in (
        replace(same, layers={**POLICY.layers, 0: replace(DROP, factor="1.06")}),
        replace(same, layers={**POLICY.layers, 1: DROP}),
        replace(same, placement=None),
        replace(same, placement=NamedPlacement("sub/p.yaml", "1")),
    ):
        assert digest(other) != digest(POLICY)


def test_the_placement_is_found_from_the_folder_of_the_policy(tmp_path):
    assert placement_path(POLICY, tmp_path / "policy.yaml") == str(tmp_path / "sub/p.yaml")
    assert placement_path(POLICY, "policy.yaml") == "sub/p.yaml"
    absolute = replace(POLICY, placement=NamedPlacement("/data/p.yaml", "1"))
    assert placement_path(absolute, "x/policy.yaml") == "/data/p.yaml"
    assert placement_path(replace(POLICY, placement=None), "policy.yaml") is None


def changed(**keys: Any) -> dict[str, Any]:
    return {**to_data(POLICY), **keys}


def layer(**keys: Any) -> dict[str, Any]:
    return changed(layers={2: keys})


WRONG: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "format = 'list'"),
    "another format": (changed(format="x"), f"must be {FORMAT}"),
    "an unknown key": (changed(rank=2), "unknown key 'rank'; the keys are"),
    "no ranks": (changed(ranks=0), "ranks = 0: must be a whole number of at least 1"),
    "no layers": (changed(layers=None), "layers = None: must be a mapping of layer numbers"),
    "a layer with a name": (changed(layers={"x": {}}), "layers: the key 'x' must be the number"),
    "a negative layer": (changed(layers={-1: {}}), "layers: the key -1 must be the number"),
    "a layer that is a number": (changed(layers={0: 1.05}), "layers.0 = 1.05: must be a mapping"),
    "no factor": (layer(scope="rank"), "layers.2.factor: is missing"),
    "a wrong factor": (layer(factor=-1), "layers.2.factor = '-1': must be a number above 0"),
    "a wrong scope": (layer(factor=1, scope="ranks"), "did you mean rank?"),
    "an unknown setting": (layer(factor=1, gamma=2), "layers.2.gamma = 2: unknown key; the keys"),
    "a stand-in": (
        layer(factor=1, standin={"rank": 16}),
        "layers.2.standin = {'rank': 16}: stand-ins for dropped assignments do not exist yet",
    ),
    "speeds": (layer(factor=1, speed_aware=True), "is not a setting of one layer"),
    "half a placement": (changed(placement={"file": "p.yaml"}), "must have the keys file and dig"),
    "a fingerprint in digits": (
        changed(model=123),
        "model = 123: must be text; put it into quotes",
    ),
    "data without names": (changed(data=["x"]), "data = ['x']: must be a mapping of names"),
    "a share of nothing": (changed(expected={"share": 0}), "expected.share = 0.0: must be finite"),
    "a loss in words": (changed(expected={"loss": "little"}), "expected.loss = 'little': must be"),
    "an unknown promise": (changed(expected={"speed": 2}), "expected.speed = 2: unknown key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_file_the_field_and_what_to_do(case):
    data, text = WRONG[case]
    with pytest.raises(ConfigError) as error:
        parse_policy(data, "here/p.yaml")
    assert str(error.value).startswith("moe.policy: the file here/p.yaml: ")
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"layers: [", "is not valid YAML"),
        (b"layers: {0: {factor: 1}, 0: {factor: 2}}", "the key 0 is given twice"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named(content, text, tmp_path):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"moe\.policy: the file .*p\.yaml: ") as error:
        read_policy(tmp_path / "p.yaml")
    assert text in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read .*give a file that exists"):
        read_policy(tmp_path / "none.yaml")


def test_the_modules_example_is_a_policy():
    from engine.moe.policy import policy_file

    assert policy_file.__doc__ is not None
    lines = policy_file.__doc__.split("\n\n")[1]
    policy = parse_policy(parse_yaml(lines, "example"), "example")
    assert sorted(policy.layers) == [0, 2]
    assert policy.expected is not None
    assert policy.expected.bound == 0.00098
