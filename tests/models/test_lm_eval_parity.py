"""The harness's scores of the engine against those of its own model on transformers, in float32.

Run: pytest -m long tests/models/test_lm_eval_parity.py
"""

from __future__ import annotations

from typing import Any

import pytest

from engine.interop.lm_eval_tasks import NAMES
from tests.helpers.lm_eval_case import instance, lockstep_lm, needs_lm_eval, results_of

pytestmark = [needs_lm_eval, pytest.mark.long]
LIMIT = 50


def reference(checkpoint: str, **settings: Any) -> Any:
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    path = f"configs/checkpoints/{checkpoint}"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, **settings)


@pytest.mark.parametrize("checkpoint", ["tiny_mixtral", "tiny_olmoe"])
def test_every_answer_and_score_is_that_of_transformers(checkpoint):
    with lockstep_lm(checkpoint) as model:
        own = results_of(model, list(NAMES), limit=LIMIT)
    other = results_of(reference(checkpoint), list(NAMES), limit=LIMIT)
    for task in NAMES:
        for here, there in zip(own["samples"][task], other["samples"][task], strict=True):
            for (mine,), (its,) in zip(here["resps"], there["resps"], strict=True):
                if isinstance(its, tuple):
                    assert mine[0] == pytest.approx(its[0], abs=1e-4)
                    assert mine[1] == its[1], (task, here["doc"])
                elif isinstance(its, float):  # hundreds of tokens, which the other sums in float32
                    assert mine == pytest.approx(its, abs=1e-3)
                else:
                    assert mine == its
        for metric, value in other["results"][task].items():
            if isinstance(value, float):
                assert own["results"][task][metric] == pytest.approx(value, rel=1e-4), metric
    assert own["results"]["lockstep_recall"]["exact_match,none"] == 1.0


def test_questions_as_messages_are_answered_as_by_transformers():
    names, options = ["lockstep_recall", "lockstep_recall_choice"], {"apply_chat_template": True}
    options |= {"limit": 8, "system_instruction": "Answer."}
    with lockstep_lm("tiny_mixtral") as model:
        own = results_of(model, names, **options)["samples"]
        assert model.tokenizer_name.endswith("__tiny_mixtral")
    other = results_of(reference("tiny_mixtral"), names, **options)["samples"]
    for task in names:
        for here, there in zip(own[task], other[task], strict=True):
            assert here["arguments"] == there["arguments"]
            assert str(here["arguments"]).count("Answer.")
    assert [each["resps"] for each in own[names[0]]] == [each["resps"] for each in other[names[0]]]


@pytest.mark.parametrize("checkpoint", ["tiny_mixtral", "tiny_olmoe"])
def test_long_inputs_lose_tokens_from_the_left_as_with_transformers(checkpoint):
    words = " the value of the second word in a list".split(" ")
    text = " ".join(words[index % len(words)] for index in range(150))
    pairs = [
        (text, " of the list"),
        ("", text[:150]),
        (text, text[:150]),
        ("recall: hat flag? hat", " flag"),
    ]
    scored = [instance("loglikelihood", *pair) for pair in pairs]
    rolling = [instance("loglikelihood_rolling", text), instance("loglikelihood_rolling", "x = 1")]
    until = {"until": [" list"], "max_gen_toks": 8, "do_sample": False}
    generated = [
        instance("generate_until", text, until),
        instance("generate_until", "def f", until),
    ]
    with lockstep_lm(checkpoint, "model.max_model_len=128") as model:
        own = [model.loglikelihood(scored), model.loglikelihood_rolling(rolling)]
        texts = model.generate_until(generated)
    # Tokens to score count in this context, and not in the other's.
    other = reference(checkpoint, max_length=127)
    scores = other.loglikelihood(scored)
    assert len(other.tok_encode(text)) > 128
    for mine, its in zip(own[0], scores, strict=True):
        assert mine == (pytest.approx(its[0], abs=1e-4), its[1])
    assert own[1] == pytest.approx(other.loglikelihood_rolling(rolling), abs=1e-3)
    assert texts == reference(checkpoint, max_length=128).generate_until(generated)
