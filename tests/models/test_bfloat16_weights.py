"""Weights in bfloat16 on the CPU: the model computes in float32, on their values and no others.

The checkpoints are in bfloat16; transformers computes the reference in float32 from the same
values, so that only the order of sums differs: where the weights are widened, which the processor's
own products of bfloat16 do not do.

    python -m pytest tests/models/test_bfloat16_weights.py
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.models.decoder import CausalLM
from engine.ops import native
from tests.helpers.model_cases import CASES, NEW_TOKENS, Reference, make_reference
from tests.helpers.model_harness import (
    load_model,
    logits_on_this_rank,
    make_config,
    one_by_one,
    run_schedule,
    whole,
)
from tests.helpers.ops_cases import on_isa
from tests.helpers.ranks import run_ranks

BFLOAT16 = torch.bfloat16
FAMILIES = [
    "mixtral",
    "olmoe-clip-bias-normalised-top-k-all",
    "qwen2-moe",
    "qwen3-moe-bias-dense-layer-window-tied",
    "deepseek-v2-groups-q-lora-biases",
    "deepseek-v3",
    "qwen3-next",
]
SHARDED = ["mixtral", "qwen2-moe", "deepseek-v3"]


@pytest.fixture(autouse=True)
def widened(monkeypatch: pytest.MonkeyPatch):
    """Use kernels that widen the weights, here and on ranks that a test starts."""
    if not native.available():
        yield
        return
    monkeypatch.setenv("LOCKSTEP_NATIVE", "generic")
    with on_isa("generic"):
        yield


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def reference(name: str) -> Reference:
        return make_reference(CASES[name], tmp_path_factory.mktemp("checkpoint"), BFLOAT16)

    return reference


@pytest.fixture(scope="module")
def one_rank():
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


@pytest.fixture(scope="module")
def models(references, one_rank: Topology):
    @cache
    def model(name: str, dtype: torch.dtype = BFLOAT16) -> CausalLM:
        return load_model(make_config(references(name).path), one_rank, dtype)

    return model


def check(reference: Reference, logits: dict[int, torch.Tensor]) -> None:
    """Same logits within 1e-4 of their scale, which choose the reference's continuation."""
    assert sorted(logits) == list(range(len(reference.sequences)))
    for s, expected in enumerate(reference.logits):
        scale = expected.abs().max()
        expected = expected[-len(logits[s]) :]
        difference = (logits[s] - expected).abs().max()
        assert difference < 1e-4 * scale, f"sequence {s}: off by {difference / scale:.1e} of scale"
        chosen = logits[s][-NEW_TOKENS:].argmax(-1).tolist()
        assert chosen == reference.sequences[s][-NEW_TOKENS:]


def inputs(reference: Reference) -> list[list[int]]:
    return [tokens[:-1] for tokens in reference.sequences]


@pytest.mark.parametrize("schedule", [whole, one_by_one])
@pytest.mark.parametrize("case", FAMILIES)
def test_one_rank_gives_the_logits_and_tokens_of_the_weights_widened(
    case, schedule, references, models, one_rank
):
    reference = references(case)
    sequences = inputs(reference)
    steps = schedule([len(tokens) for tokens in sequences])
    check(reference, run_schedule(models(case), one_rank, sequences, steps))


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["expert", "tensor"])
@pytest.mark.parametrize("case", SHARDED)
def test_two_ranks_give_them_too(case, parallel, references):
    reference = references(case)
    sequences = inputs(reference)
    schedules = {"whole": whole([len(tokens) for tokens in sequences])}
    given = (reference.path, sequences, schedules, parallel, NEW_TOKENS, BFLOAT16)
    first, second = run_ranks(logits_on_this_rank, 2, *given)
    check(reference, first["whole", None] | second["whole", None])


@pytest.mark.parametrize("case", FAMILIES)
def test_matrices_are_bfloat16_and_all_else_is_float32(case, models):
    model = models(case)
    assert model.dtype == torch.float32 and model.weight_dtype == BFLOAT16
    for name, parameter in model.named_parameters():
        # Gates, MLA's up-projection that is absorbed into queries and outputs, and taps.
        small = name.endswith(("gate.weight_ED", "output_gate_1D", "kv_up_HOC", "conv_C1W"))
        is_matrix = parameter.dim() > 1 and not small
        assert parameter.dtype == (BFLOAT16 if is_matrix else torch.float32), name
    assert model.rotary.table_PR.dtype == torch.float32


@pytest.mark.parametrize("case", FAMILIES)
def test_matrices_take_half_the_memory_they_take_in_float32(case, models):
    wide, narrow = (
        {name: parameter.nbytes for name, parameter in models(case, dtype).named_parameters()}
        for dtype in (torch.float32, BFLOAT16)
    )
    halved = {name for name in wide if narrow[name] * 2 == wide[name]}
    assert all(narrow[name] == wide[name] for name in wide.keys() - halved)
    # Even of these models of 32 columns; of real ones gates and vectors are a thousandth.
    assert sum(wide[name] for name in halved) > 0.85 * sum(wide.values())
