"""How a run treats an existing output or ledger: start, resume, stop or refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.batch.input.index import scan_input
from engine.batch.job_identity import differences, make_manifest, result_settings
from engine.batch.ledger import Ledger, ShardWriter
from engine.batch.manifest import (
    JobError,
    decide_start_or_resume,
    finalize,
    sibling_path,
)
from engine.config import CapacityConfig
from engine.config.loader import config_from_tree
from engine.moe.placement.placement import LayerPlacement, Placement
from engine.moe.placement.placement_file import digest as placement_digest
from engine.moe.placement.placement_file import write_placement
from engine.moe.policy.policy import Expected, NamedPlacement, Policy
from engine.moe.policy.policy_file import digest, write_policy
from engine.request import Completion, RequestError

BAD_LINE = RequestError("invalid_json", "bad line")


def config(**sections):
    return config_from_tree({"model": {"path": "model"}, **sections})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n{"id": 2, "prompt": "b"}\n')
    return tmp_path / "out.jsonl"


def manifest(output: Path, **sections):
    return make_manifest(scan_input(output.with_name("in.jsonl")), config(**sections))


def run(output: Path, job: dict, *, records: int = 2, overwrite: bool = False) -> str:
    """Start or resume a job, append that many missing records, finish it when both exist."""
    ledger = Ledger(output)
    try:
        state = decide_start_or_resume(ledger, job, overwrite=overwrite)
        if state == "complete":
            return state
        ledger.create_shards(1)
        writer = ShardWriter(ledger.directory, 0)
        todo = [index for index, done in enumerate(ledger.done(2)) if not done]
        writer.append(Completion.failure(index, str(index), BAD_LINE) for index in todo[:records])
        writer.close()
        if ledger.done(2).all():
            finalize(ledger, job, ledger.merge(range(2)))
        return state
    finally:
        ledger.close()


def names(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir()} - {"in.jsonl"}


def test_a_new_job_runs_fresh_and_leaves_output_and_manifest(output):
    assert run(output, manifest(output)) == "fresh"
    assert names(output) == {"out.jsonl", "out.jsonl.job.json"}
    made = json.loads(sibling_path(output, "job.json").read_text())
    assert made["output"] == {"size": output.stat().st_size, "errors": 2}


def test_the_same_job_again_is_complete_and_leaves_nothing_behind(output):
    run(output, manifest(output))
    before = output.read_bytes()
    assert run(output, manifest(output)) == "complete"
    assert output.read_bytes() == before
    assert names(output) == {"out.jsonl", "out.jsonl.job.json"}


def test_an_unfinished_job_resumes_also_with_overwrite(output):
    assert run(output, manifest(output), records=1) == "fresh"
    assert run(output, manifest(output), records=0, overwrite=True) == "resume"
    assert run(output, manifest(output)) == "resume"
    assert run(output, manifest(output)) == "complete"


def test_overwrite_runs_a_finished_job_again_and_is_resumed_if_killed(output):
    run(output, manifest(output))
    assert run(output, manifest(output), records=1, overwrite=True) == "fresh"
    assert not sibling_path(output, "job.json").exists(), "the old output is no longer complete"
    assert output.exists(), "it stays until the new one replaces it"
    assert run(output, manifest(output), overwrite=True) == "resume"
    assert run(output, manifest(output)) == "complete"


def test_a_kill_between_finalizing_and_removing_the_ledger_is_complete(output, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "remove", lambda self: None)
        run(output, manifest(output))
    assert "out.jsonl.parts" in names(output)
    assert run(output, manifest(output)) == "complete"
    assert "out.jsonl.parts" not in names(output)


def test_a_kill_between_merging_and_finalizing_resumes_with_nothing_to_run(output):
    ledger = Ledger(output)
    decide_start_or_resume(ledger, manifest(output), overwrite=False)
    ledger.create_shards(1)
    writer = ShardWriter(ledger.directory, 0)
    writer.append(Completion.failure(index, str(index), BAD_LINE) for index in range(2))
    writer.close()
    ledger.merge(range(2))
    ledger.close()
    assert run(output, manifest(output), records=0) == "resume"
    assert run(output, manifest(output)) == "complete"


def test_a_finished_output_of_other_settings_is_refused_with_what_differs(output):
    run(output, manifest(output))
    other = manifest(output, sampling={"temperature": 0.5})
    with pytest.raises(JobError, match=r"sampling.temperature was 0.0, is 0.5\. Use --overwrite"):
        run(output, other)
    assert names(output) == {"out.jsonl", "out.jsonl.job.json"}
    assert run(output, other, overwrite=True) == "fresh"
    assert run(output, other) == "complete"


def test_records_of_another_job_are_refused_and_kept(output):
    run(output, manifest(output), records=1)
    other = manifest(output, sampling={"max_new_tokens": 5})
    with pytest.raises(JobError, match="holds 1 finished records of another job"):
        run(output, other)
    assert run(output, manifest(output), records=0) == "resume"
    assert run(output, other, records=1, overwrite=True) == "fresh"
    assert run(output, other) == "resume"


def test_another_job_that_finished_nothing_is_replaced(output):
    run(output, manifest(output), records=0)
    assert run(output, manifest(output, sampling={"max_new_tokens": 5})) == "fresh"


def test_a_changed_input_is_another_job(output):
    run(output, manifest(output), records=1)
    with output.with_name("in.jsonl").open("a") as file:
        file.write('{"id": 3}\n')
    with pytest.raises(JobError, match="the input was .* 50 bytes, .* is .* 60 bytes"):
        run(output, manifest(output))


def test_a_moved_input_is_the_same_job(output):
    job = manifest(output)
    output.with_name("in.jsonl").rename(output.with_name("moved.jsonl"))
    moved = make_manifest(scan_input(output.with_name("moved.jsonl")), config())
    assert differences(job, moved) == []


def test_an_output_of_unknown_origin_is_refused(output):
    output.write_text("precious\n")
    with pytest.raises(JobError, match="no manifest records which job made it"):
        run(output, manifest(output))
    assert output.read_text() == "precious\n" and names(output) == {"out.jsonl"}
    assert run(output, manifest(output), overwrite=True) == "fresh"


def test_an_output_that_was_changed_since_is_not_complete(output):
    run(output, manifest(output))
    with output.open("a") as file:
        file.write("more\n")
    with pytest.raises(JobError, match="was changed after the job finished"):
        run(output, manifest(output))


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_manifest_next_to_records_is_refused_and_can_be_overwritten(output, content):
    run(output, manifest(output), records=1)
    (output.with_name("out.jsonl.parts") / "manifest.json").write_text(content)
    with pytest.raises(JobError, match=r"manifest.json: is damaged"):
        run(output, manifest(output))
    assert run(output, manifest(output), overwrite=True) == "fresh"


def test_a_deleted_output_is_made_again(output):
    run(output, manifest(output))
    output.unlink()
    assert run(output, manifest(output)) == "fresh"


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"expert": 2}},
        {"scheduler": {"max_batch_tokens": 64}},
        {"runtime": {"device": "cpu", "timeout_s": 3.0, "seed": 4}},
        {"profiler": {"enabled": False}},
        {"moe": {"experts": {"backend": "torch"}}},
        {"moe": {"dispatch": {"deduplicate": False}}},
        {"moe": {"overlap": {"chunks": 2, "by": "tokens"}}},
    ],
)
def test_how_a_job_runs_may_change_between_runs(sections):
    assert result_settings(config(**sections)) == result_settings(config())


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"path": "other"}},
        {"model": {"path": "model", "dtype": "bfloat16"}},
        {"model": {"path": "model", "quantization": "dequantize"}},
        {"sampling": {"seed": 1}},
        {"sampling": {"stop": ["x"]}},
        {"moe": {"capacity": {"policy": "token_drop", "factor": 1.1}}},
        {"moe": {"dispatch": {"dtype": "fp8"}}},
        {"moe": {"dispatch": {"partial_sums": True}}},
        {"moe": {"dispatch": {"transport": "deepep"}}},
        {"moe": {"shared_expert": "balanced", "dispatch": {"partial_sums": True}}},
    ],
)
def test_what_changes_results_makes_another_job(sections):
    assert result_settings(config(**sections)) != result_settings(config())


def test_newer_settings_are_included_only_where_they_differ_so_that_older_ledgers_resume(output):
    optional = ("moe.dispatch", "moe.shared_expert", "model.quantization")
    assert not [key for key in result_settings(config()) if key.startswith(optional)]
    run(output, manifest(output), records=1)
    other = manifest(output, moe={"dispatch": {"dtype": "fp8"}})
    with pytest.raises(JobError, match=r'moe\.dispatch\.dtype was "auto", is "fp8"'):
        run(output, other)
    other = manifest(output, model={"path": "model", "quantization": "int8"})
    with pytest.raises(JobError, match=r'model\.quantization was "auto", is "int8"'):
        run(output, other)
    assert run(output, manifest(output)) == "resume"


def test_the_seed_of_random_weights_changes_results():
    dummy = {"path": "model", "load_format": "dummy"}
    seeds = [config(model=dummy, runtime={"seed": seed}) for seed in (0, 1)]
    assert result_settings(seeds[0]) != result_settings(seeds[1])


def test_a_path_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = config(model={"path": str(tmp_path / "model")})
    assert result_settings(config()) == result_settings(absolute)


def test_a_job_is_resumed_with_its_policy_alone(output, tmp_path):
    placement = Placement(2, 4, {0: LayerPlacement((0, 1, 0, 1), ((),) * 4)})
    write_placement(placement, tmp_path / "placement.yaml")
    drop = CapacityConfig(policy="token_drop", factor="1.05")
    policy = Policy({0: drop}, NamedPlacement("placement.yaml", placement_digest(placement)))

    def job(given: Policy | None, name: str = "policy.yaml", **capacity):
        file = None
        if given is not None:
            write_policy(given, tmp_path / name)
            file = str(tmp_path / name)
        return manifest(output, moe={"policy": file, "capacity": capacity})

    first = job(policy)
    assert first["policy"] == {"path": str(tmp_path / "policy.yaml"), "digest": digest(policy)}
    assert first["settings"]["moe.placement"] == placement_digest(placement)
    # moe.capacity has no effect, a copy of the file is the same policy, and what it expects may
    # have been measured since.
    assert run(output, first, records=1) == "fresh"
    measured = replace(policy, expected=Expected(share=0.9))
    assert run(output, job(measured, "copy.yaml", policy="token_drop"), records=0) == "resume"
    other = replace(policy, layers={0: replace(drop, factor="1.1")})
    for wrong, text in (
        (job(other), f'moe.policy was "{digest(policy)}", is "{digest(other)}"'),
        (job(None), f'moe.policy was "{digest(policy)}", is null'),
    ):
        with pytest.raises(JobError) as error:
            run(output, wrong)
        assert text in str(error.value)
        assert "moe.capacity" not in str(error.value)
    assert "policy" not in job(None) and "moe.policy" not in job(None)["settings"]
