"""Greedy tokens of the bundled models with bfloat16 weights against transformers in bfloat16.

transformers rounds every intermediate result to bfloat16, the engine none of its sums, so the two
differ by more than the order of sums: where transformers' two best logits are closer than a few
steps of bfloat16, rounding alone decides which is first.

    python -m pytest -s tests/models/test_bfloat16_greedy.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.distributed import bootstrap
from tests.helpers.model_harness import load_model, make_config, run_schedule, whole

CHECKPOINTS = Path(__file__).parents[2] / "configs" / "checkpoints"
NUM_TEXTS, NUM_TOKENS = 8, 256
# Two logits are tied within this many steps of bfloat16 at the size of the larger: the steps of
# either, and of the roundings before them.
STEPS = 2


@pytest.mark.parametrize("name", ["tiny_mixtral", "tiny_olmoe"])
def test_greedy_tokens_are_those_of_transformers_in_bfloat16_where_logits_are_not_tied(name):
    folder = CHECKPOINTS / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (folder / "eval" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines[:NUM_TEXTS]]
    sequences = [tokenizer(text).input_ids[:NUM_TOKENS] for text in texts]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    topology = bootstrap.start(make_config(Path("unused")), {})
    try:
        model = load_model(make_config(folder), topology, torch.bfloat16)
        steps = whole([len(tokens) for tokens in sequences])
        ours = run_schedule(model, topology, sequences, steps)
    finally:
        bootstrap.stop(topology)
    positions = same = tied = 0
    for index, tokens in enumerate(sequences):
        with torch.inference_mode():
            logits = theirs(torch.tensor([tokens])).logits[0].float()
        best = logits.topk(2, dim=-1)
        step = torch.finfo(torch.bfloat16).eps * best.values[:, 0].abs()
        is_tied = best.values[:, 0] - best.values[:, 1] <= STEPS * step
        equal = ours[index].argmax(-1) == best.indices[:, 0]
        assert equal[~is_tied].all(), f"text {index}: positions {(~equal & ~is_tied).nonzero()}"
        positions, same = positions + len(tokens), same + int(equal.sum())
        tied += int(is_tied.sum())
    print(
        f"{name}: {positions} positions, {same / positions:.2%} equal, {tied / positions:.2%} tied"
    )
    assert tied < 0.1 * positions and same > 0.98 * positions
