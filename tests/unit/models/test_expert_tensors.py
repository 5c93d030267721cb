"""Which weights of a checkpoint are experts, where transformers builds the model as where we do."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from engine.models.expert_tensors import expert_tensors
from engine.models.registry import read_config, read_spec
from tests.helpers.model_cases import CASES
from tests.helpers.transformers_cases import FOREIGN_CASES


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("mixtral", ("w1", "w3", "w2")),
        ("phimoe", ("w1", "w3", "w2")),
        ("dots1", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_found_by_the_names_that_their_family_was_published_with(
    case: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    (CASES | FOREIGN_CASES)[case].model().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        stored = list(tensors.keys())
    spec = read_spec(read_config(tmp_path, "transformers"), "transformers")
    found = expert_tensors(tmp_path, spec, stored, "transformers")
    for layer, (inner, outer) in found.items():
        own = [name for name in stored if f".layers.{layer}." in name and ".experts." in name]
        assert sorted(inner) == [name for name in own if name.split(".")[-2] in names[:2]] != []
        assert sorted(outer) == [name for name in own if name.split(".")[-2] == names[2]] != []
