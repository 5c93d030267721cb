"""The language model of checkpoints that see images, built by transformers, on text.

Against transformers' model with all its parts; the tower for images is not read.

    python -m pytest tests/models/test_transformers_text_models.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.models.transformers_model.model import TransformersModel
from tests.helpers.model_cases import NEW_TOKENS, Reference, make_reference
from tests.helpers.model_harness import chunked, load_model, make_config, run_schedule, whole
from tests.helpers.seeing_cases import SEEING_CASES as CASES
from tests.models.test_parity import check, inputs

OTHERS = re.compile("visual|vision|projector")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


def written(case: str, folder: Path) -> Reference:
    """A checkpoint whose tensors that are not to be read hold no numbers."""
    reference = make_reference(CASES[case], folder)
    edit(folder, lambda name, tensor: tensor.fill_(torch.nan) if OTHERS.search(name) else tensor)
    return reference


def edit(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def check_logits(reference: Reference, one_rank: Topology) -> None:
    model = load_model(make_config(reference.path), one_rank)
    assert isinstance(model, TransformersModel)
    sequences = inputs(reference)
    lengths = [len(tokens) for tokens in sequences]
    for make in (whole, chunked):
        check(reference, run_schedule(model, one_rank, sequences, make(lengths), NEW_TOKENS))


@pytest.mark.parametrize("case", CASES)
def test_text_gives_the_logits_of_the_whole_model(
    case: str, tmp_path: Path, one_rank: Topology
) -> None:
    check_logits(written(case, tmp_path), one_rank)


def test_stacked_experts_are_read_in_either_orientation(tmp_path: Path, one_rank: Topology) -> None:
    reference, shapes = written("qwen3-vl-moe", tmp_path), set()

    def turn(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            return tensor
        shapes.add(tuple(tensor.shape))
        return tensor.transpose(1, 2).contiguous()

    edit(tmp_path, turn)
    assert len(shapes) == 2 and all(rows != columns for _, rows, columns in shapes)
    check_logits(reference, one_rank)
