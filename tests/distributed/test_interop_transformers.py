"""Transformers models whose experts run on Lockstep's dispatch, on two ranks over gloo.

Run: pytest tests/distributed/test_interop_transformers.py
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CapacityConfig, MoEConfig
from tests.helpers import reference
from tests.helpers.ranks import run_ranks
from tests.helpers.transformers_case import batch, load, needs_interface, run, write

pytestmark = [pytest.mark.long, needs_interface]

WORLD = 2
FAMILIES = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss")
TIMEOUT_S = 300.0
RULES: list[dict[str, Any]] = [
    {},
    {"scope": "rank"},
    {"consensus": "quota"},
    {"consensus": "local"},
    {"order": "first"},
    {"order": "random", "seed": 5},
    {"renormalize": True},
]
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def run_family(rank: int, path: Path) -> dict[str, Any]:
    from engine.interop.transformers_ep import register

    register()
    with torch.inference_mode():
        found = {name: run(load(path, name, WORLD)) for name in ("all_to_all", "lockstep")}
    return found


def run_capacity(rank: int, path: Path) -> dict[str, Any]:
    """The calls of every layer under each rule, and what else one model shows."""
    from engine.interop.transformers_ep import register
    from engine.interop.transformers_layer import LockstepEP

    experts = register(MoEConfig(capacity=CapacityConfig(policy="token_drop", factor="1")), "drops")
    model = load(path, "drops", WORLD)
    calls: list[Call] = []
    original = LockstepEP.__call__

    def record(self: Any, *given: torch.Tensor) -> torch.Tensor:
        out = original(self, *given)
        calls.append((*(each.clone() for each in given), out.clone()))
        return out

    LockstepEP.__call__ = record
    ids, mask = batch()
    by_rule = []
    for rules in RULES:
        with torch.inference_mode():
            if rules:
                changed = {"policy": "token_drop", "factor": "1", **rules}
                experts.set_capacity(CapacityConfig(**changed))
            calls.clear()
            model(input_ids=ids, attention_mask=mask)
        by_rule.append((list(calls), experts.drops))
    found: dict[str, Any] = {"rules": by_rule}

    experts.follow(model)
    with torch.inference_mode():
        model(input_ids=ids[:, :1])
    found["decode"] = experts.drops
    LockstepEP.__call__ = original

    with torch.no_grad():  # outside inference mode, after calls within it
        found["one_token"] = model(input_ids=ids[:1, -1:]).logits
    for key, call in {
        "gradient": lambda: model(input_ids=ids),
        "saved": lambda: model.save_pretrained(path / "again"),
        "layout": lambda: spread_otherwise(path),
        "settings": lambda: disagree(rank, path),
    }.items():
        with pytest.raises(Exception) as raised:
            call()
        found[key] = f"{raised.type.__name__}: {raised.value}"
    return found


def disagree(rank: int, path: Path) -> None:
    from engine.interop.transformers_ep import register

    factor = ("1", "1.5")[rank]
    register(MoEConfig(capacity=CapacityConfig(policy="token_drop", factor=factor)), "differs")
    load(path, "differs", WORLD)


def spread_otherwise(path: Path) -> None:
    import transformers
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(fsdp_size=WORLD, ep_size=WORLD, ep_implementation="drops")
    transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=config)


def run_all(rank: int, folder: Path) -> dict[str, Any]:
    families = {name: run_family(rank, folder / name) for name in FAMILIES}
    return {"families": families, "capacity": run_capacity(rank, folder / "mixtral")}


@functools.cache
def on_ranks() -> list[dict[str, Any]]:
    """Every rank's results; they start once for all tests, because transformers is slow to."""
    folder = Path(tempfile.mkdtemp(prefix="transformers-"))
    for name in FAMILIES:
        write(name, folder / name)
    found = run_ranks(run_all, WORLD, folder, timeout=TIMEOUT_S)
    one = load(folder / "mixtral", None, 1)
    for rank in found:
        rank["one"] = one
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_without_drops_the_result_is_that_of_transformers_all_to_all(family):
    for rank in on_ranks():
        theirs, ours = (rank["families"][family][each] for each in ("all_to_all", "lockstep"))
        scale = theirs["logits"].abs().max()
        assert (theirs["logits"] - ours["logits"]).abs().max() <= 1e-5 * scale
        assert torch.equal(theirs["tokens"], ours["tokens"])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ranks_have_the_same_bits(family):
    first, second = (rank["families"][family]["lockstep"]["logits"] for rank in on_ranks())
    assert torch.equal(first, second)


def decide(call: Call, rules: dict[str, Any], layer: int) -> reference.Outcome:
    """What the reference keeps of a call: each rank has half of its tokens."""
    x_TD, ids_TK, weights_TK, _ = call
    num_tokens, top_k = ids_TK.shape
    number = np.arange(num_tokens)
    inputs = []
    for owned in np.split(number, [-(-num_tokens // WORLD)]):
        scores = np.zeros((len(owned), 4), dtype=np.float32)
        np.put_along_axis(scores, ids_TK.numpy()[owned], weights_TK.float().numpy()[owned], axis=1)
        inputs.append(
            reference.RankInput(
                scores=scores,
                topk_ids=ids_TK.numpy()[owned],
                weights=weights_TK.float().numpy()[owned],
                request=np.zeros_like(owned),
                position=owned,
                competes=np.ones(len(owned), dtype=bool),
            )
        )
    given = reference.Rules(**{"policy": "token_drop", "factor": "1", **rules}, layer=layer)
    return reference.decide(inputs, given, reference.Family(), [0, 2, 4], 4, top_k)


@pytest.mark.parametrize("rule", range(len(RULES)), ids=lambda index: str(RULES[index]))
def test_token_drop_computes_what_the_references_rule_keeps_by_combine_weight(rule):
    ranks = on_ranks()
    one = ranks[0]["one"]
    calls, _ = ranks[0]["capacity"]["rules"][rule]
    dropped = [0] * WORLD
    assert len(calls) == 2
    for layer, call in enumerate(calls):
        x_TD, ids_TK, _, out_TD = call
        outcome = decide(call, RULES[rule], layer)
        kept = [token for rank in outcome.ranks for token in rank.weights]
        weights_TK = torch.tensor(
            [[kept[t].get(e, 0.0) for e in ids] for t, ids in enumerate(ids_TK.tolist())]
        )
        with torch.inference_mode():
            wanted = one.model.layers[layer].mlp.experts(x_TD, ids_TK, weights_TK)
        torch.testing.assert_close(out_TD, wanted, rtol=1e-5, atol=1e-5)
        for w, rank in enumerate(outcome.ranks):
            dropped[w] += int((~rank.keep).sum())
    counted = [rank["capacity"]["rules"][rule][1] for rank in ranks]
    assert [drops.dropped for drops in counted] == dropped
    assert sum(dropped) > 0


def test_tokens_of_a_phase_outside_the_policys_phases_are_not_limited():
    assert all(rank["capacity"]["decode"].routed == 0 for rank in on_ranks())


def test_a_rank_without_tokens_takes_part():
    ids, _ = batch()
    with torch.inference_mode():
        wanted = on_ranks()[0]["one"](input_ids=ids[:1, -1:]).logits
    for rank in on_ranks():
        torch.testing.assert_close(rank["capacity"]["one_token"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("gradient", "ValueError: Lockstep's experts have no backward pass; call the model under"),
        ("saved", "meta"),
        ("settings", "ValueError: register: rank 1 has other settings than rank 0 (MoEConfig("),
        ("layout", "ValueError: ep_size = 2, tp_size = 1: Lockstep's experts need one batch on"),
    ],
)
def test_what_cannot_be_served_fails_on_every_rank(key, text):
    for rank in on_ranks():
        assert text in rank["capacity"][key]
