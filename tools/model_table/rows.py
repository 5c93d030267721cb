"""Rows: what this engine makes of a configuration, found as a run finds it, without memory."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from engine.model_check.capacity_rules import capacity_of, score_basis
from engine.model_check.rank_share import Setup
from engine.models.model_types import Implementation, uses_transformers
from engine.models.registry import read_config
from engine.models.spec import ModelSpec, SparseSpec
from model_table.configurations import Configuration

_RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A model type."""

    model_type: str
    by_transformers: bool  # who builds it where model.implementation is auto
    refusal: str | None  # why it does not run; None: it runs
    also: bool = False  # of a family here: whether transformers' implementation runs it, too
    scores: str = ""  # which of the router's scores capacity has
    policies: tuple[str, ...] = ()  # of capacity
    cases: tuple[str, ...] = ()  # of the parity tests


def row_of(configuration: Configuration) -> Row:
    """Return the row of a configuration."""
    model_type = configuration.model_type
    found = try_out(model_type, configuration.hf_config, "auto")
    by_transformers = uses_transformers(model_type, "auto")
    if isinstance(found, str):
        return Row(model_type=model_type, by_transformers=by_transformers, refusal=found)
    also = False
    if not by_transformers:
        other = try_out(model_type, configuration.hf_config, "transformers")
        also = not isinstance(other, str)
    scores, policies = capacity_in_words(found)
    return Row(
        model_type=model_type,
        by_transformers=by_transformers,
        refusal=None,
        also=also,
        scores=scores,
        policies=policies,
        cases=configuration.cases,
    )


def try_out(model_type: str, hf_config: Any, implementation: Implementation) -> ModelSpec | str:
    """Return the spec of a configuration's model, once it is built without memory; or why not."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        hf_config.save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text())
        # The name of the checkpoint's type, also where it is read as another one.
        (folder / "config.json").write_text(json.dumps({**values, "model_type": model_type}))
        try:
            checked = read_config(folder, implementation)
            model = Setup(checked, torch.bfloat16, implementation=implementation).build()
        except ValueError as error:
            return reason_of(str(error))
    return model.spec


def capacity_in_words(spec: ModelSpec) -> tuple[str, tuple[str, ...]]:
    """Return which scores capacity has of a model's router, and the policies that it may have."""
    answers = capacity_of(spec, _RANKS) or {}
    policies = ("token_drop", "expanded_drop")
    sparse = next(layer.mlp for layer in spec.layers if isinstance(layer.mlp, SparseSpec))
    allowed = tuple(name for name in policies if str(answers.get(name)).startswith("yes"))
    return score_basis(sparse.moe.router), allowed


def reason_of(sentence: str) -> str:
    """Return the reason in a refusal, without what is the same in all of them."""
    text = re.sub(r"^model\.path = '[^']*': ", "", sentence)
    text = re.sub(
        r"^config\.json has model_type = .*? with transformers' implementation: ", "", text
    )
    text = re.sub(r"; (use a checkpoint of one of|supported:) .*$", "", text)
    return text.replace(f"transformers {transformers.__version__}", "transformers")


def rows_of(found: Sequence[Configuration]) -> list[Row]:
    """Return the rows of configurations."""
    return [row_of(each) for each in found]
