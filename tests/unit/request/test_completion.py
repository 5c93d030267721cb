"""Completions become records. Run: pytest tests/unit/request/test_completion.py"""

import json

import numpy as np
import pytest

from engine.request import CapacityUse, Completion, RequestError


def test_gate_mass_kept_is_the_share_of_all_mass_subject_to_capacity():
    use = CapacityUse()
    assert use.gate_mass_kept == 1.0, "without capacity nothing is dropped"
    use.add(CapacityUse(assignments=30, dropped=3, added=1, mass=3.0, mass_kept=3.0))
    use.add(CapacityUse(assignments=10, dropped=5, added=0, mass=1.0, mass_kept=0.6))
    use.add(CapacityUse(assignments=7))
    assert (use.assignments, use.dropped, use.added) == (47, 8, 1)
    assert use.gate_mass_kept == pytest.approx(0.9)


def test_the_share_of_gate_mass_does_not_depend_on_the_prefill_chunks():
    # Token sums are float32 and added in float64, which holds their sum exactly: a request's record
    # has the same digits for any chunks, and survives being written and read.
    generator = np.random.default_rng(0)
    mass_T = generator.uniform(0.5, 2.0, 500).astype(np.float32).astype(np.float64)
    kept_T = (mass_T * generator.uniform(0.0, 1.0, 500)).astype(np.float32).astype(np.float64)
    records = set()
    for chunk in (1, 7, 64, 500):
        use = CapacityUse()
        for start in range(0, 500, chunk):
            part = slice(start, start + chunk)
            mass, kept = mass_T[part].sum(), kept_T[part].sum()
            use.add(CapacityUse(2, 1, 0, mass=mass.item(), mass_kept=kept.item()))
        records.add(json.dumps(use.gate_mass_kept))
        assert json.loads(json.dumps(use.gate_mass_kept)) == use.gate_mass_kept
    assert len(records) == 1


def test_a_record_has_optional_keys_only_when_present():
    done = Completion(
        index=4, id="a", text="hi", token_ids=[5, 6], finish_reason="stop",
        prompt_tokens=3, completion_tokens=2,
    )  # fmt: skip
    capacity = {"assignments": 0, "dropped": 0, "added": 0, "gate_mass_kept": 1.0}
    assert done.record() == {
        "id": "a",
        "text": "hi",
        "token_ids": [5, 6],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "capacity": capacity,
    }
    done.logprobs, done.prompt_logprobs = [-0.5, -1.0], [None, -2.0, -3.0]
    assert done.record()["logprobs"] == [-0.5, -1.0]
    assert done.record()["prompt_logprobs"] == [None, -2.0, -3.0]
    assert "error" not in done.record()


def test_a_failure_has_message_and_line():
    record = Completion.failure(
        2, "b", RequestError("invalid_json", "bad line", 9), line=7
    ).record()
    assert record["finish_reason"] == "error"
    assert record["error"] == {"code": "invalid_json", "message": "bad line", "line": 7}
    assert record["usage"] == {"prompt_tokens": 9, "completion_tokens": 0}
    assert (record["text"], record["token_ids"]) == ("", [])
