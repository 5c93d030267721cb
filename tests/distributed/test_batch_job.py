"""The batch job from command line to output, on one and two ranks, with every kind of kill.

python -m pytest tests/distributed/test_batch_job.py
"""

from __future__ import annotations

import bz2
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.batch.ledger import Ledger, shard_path, shards_dir
from tests.helpers.batch_case import (
    ALL,
    BAD,
    CONTEXT,
    GOOD,
    IDS,
    NUM_GOOD,
    command,
    committed,
    infer,
    infer_each,
    records,
    report,
    run,
)
from tests.helpers.ranks import RanksFailed, run_ranks

ROOT = Path(__file__).resolve().parents[2]


def test_every_line_has_its_record_in_input_order(undisturbed):
    assert [record["id"] for record in undisturbed] == IDS
    first = undisturbed[0]
    assert first["finish_reason"] == "length" and "error" not in first and "logprobs" not in first
    prompt = json.loads(GOOD[0])["prompt"]
    assert first["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 2}
    assert len(first["token_ids"]) == 2
    # Top-2 of two layers, the second of which runs what is read alone: the prompt's end, one token.
    assert first["capacity"]["assignments"] == (len(prompt) + 1) * 2 + 2 * 2
    by_id = {record["id"]: record for record in undisturbed}
    assert by_id[7]["prompt_logprobs"][0] is None and len(by_id[7]["prompt_logprobs"]) == 3
    assert len(by_id["o"]["logprobs"]) == 5 and all(value <= 0 for value in by_id["o"]["logprobs"])
    assert by_id["m"]["usage"]["prompt_tokens"] == len("[user]hi")


def test_a_bad_line_becomes_an_error_record_with_its_line_number(undisturbed):
    errors = {
        place: record["error"] for place, record in enumerate(undisturbed) if "error" in record
    }
    assert [(place, error["line"]) for place, error in errors.items()] == [
        (2, 4),
        (4, 6),
        (6, 8),
        (8, 10),
    ]
    assert "on line 1" in errors[2]["message"]
    assert "not valid JSON" in errors[4]["message"]
    assert "200 tokens" in errors[6]["message"] and str(CONTEXT) in errors[6]["message"]
    assert "no id" in errors[8]["message"]
    assert all(undisturbed[place]["text"] == "" for place in errors)


def test_the_job_leaves_its_config_and_report_next_to_the_output_and_no_ledger(job, undisturbed):
    output = job / "undisturbed.jsonl"
    assert {path.name for path in job.glob("undisturbed*")} == {
        "undisturbed.jsonl",
        "undisturbed.jsonl.config.yaml",
        "undisturbed.jsonl.job.json",
        "undisturbed.jsonl.report.json",
    }
    values = report(output)
    assert (values["total"], values["errors"], values["requests"], values["resumed"]) == (
        ALL,
        len(BAD),
        ALL,
        0,
    )
    generated = sum(record["usage"]["completion_tokens"] for record in undisturbed)
    assert values["generated_tokens"] == generated
    assert values["run"]["ranks"][0]["tokens_prefill"] > 0


def infer_slowly(rank: int, argv: list[str]) -> tuple[int, str, str]:
    """Run infer.py with a tokenizer that takes a quarter of a second for a text."""
    from engine.generation.prompt_encoder import PromptEncoder

    encode = PromptEncoder.encode_text

    def slow(self, key, text, **options):
        time.sleep(0.25)
        return encode(self, key, text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptEncoder, "encode_text", slow)
        return infer(rank, argv)


@pytest.mark.slow
@pytest.mark.long
def test_many_documents_longer_than_the_context_do_not_look_like_a_hang(job, tmp_path):
    """One rank has all it may run and waits; refusing them takes the other longer than it may."""
    good = [{"id": "first", "prompt": "a"}, {"id": "last", "prompt": "b"}]
    long = [{"id": number, "prompt": "x" * 200} for number in range(32)]
    lines = [good[0], *long, good[1]]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    output = tmp_path / "out.jsonl"
    argv = ["--config", str(job / "config.yaml"), "--input", str(tmp_path / "in.jsonl")]
    argv += [
        "--output",
        str(output),
        "--set",
        "runtime.timeout_s=3",
        "--set",
        "scheduler.max_sequences=1",
    ]
    for code, _, err in run_ranks(infer_slowly, 2, argv, timeout=60.0):
        assert code == 0, err
    done = records(output)
    assert [record["id"] for record in done] == [line["id"] for line in lines]
    codes = [record.get("error", {}).get("code") for record in done]
    assert codes == [None, *["context_length_exceeded"] * 32, None]


def test_two_ranks_give_the_records_of_one_and_share_the_work(job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    (code, out, err), (other_code, other_out, other_err) = run(2, command(job, output))
    assert (code, other_code) == (0, 0), err + other_err
    assert records(output) == undisturbed
    assert f"{ALL} requests, {len(BAD)} with an error record." in out
    assert f"had no effect: 'answer' ({NUM_GOOD - 3} lines)." in out
    assert report(output)["user_keys"] == {"answer": NUM_GOOD - 3}
    assert other_out == "" and other_err == "", "only rank 0 prints"
    assert all(rank["tokens_prefill"] > 0 for rank in report(output)["run"]["ranks"])


@pytest.mark.parametrize(
    "event, victim, again", [("kill before", 1, 1), ("kill inside", 0, 2), ("kill after", 1, 2)]
)
def test_a_killed_job_resumes_with_nothing_lost_doubled_or_redone(
    job, undisturbed, tmp_path, event, victim, again
):
    output = tmp_path / "out.jsonl"
    with pytest.raises(RanksFailed, match=f"rank {victim}: exited without a result, exit code -9"):
        run(2, command(job, output), (victim, 3, event))
    done = committed(output, 2)
    assert 0 < len(done) < ALL and not output.exists()
    for code, _, err in run(again, command(job, output)):
        assert code == 0, err
    assert records(output) == undisturbed
    values = report(output)
    assert (values["resumed"], values["requests"]) == (len(done), ALL - len(done))
    assert not shards_dir(output).exists()


@pytest.mark.parametrize(
    "name, drain_s, code", [("SIGTERM", 20, 143), ("SIGTERM", 0, 143), ("SIGINT", 20, 130)]
)
def test_a_signal_ends_all_ranks_after_what_is_done_is_written(
    job, undisturbed, tmp_path, name, drain_s, code
):
    output = tmp_path / "out.jsonl"
    argv = command(job, output, "--set", f"runtime.drain_s={drain_s}")
    outcomes = run(2, argv, (1, 2, name))
    assert [status for status, _, _ in outcomes] == [code, code], "both exit at the same step"
    assert all(name in err and "Traceback" not in err for _, _, err in outcomes)
    done = committed(output, 2)
    assert done and not output.exists()
    # Requests are taken in input order: there is a gap where one was started and not finished.
    drained = name == "SIGTERM" and drain_s > 0
    assert (done == set(range(len(done)))) == drained, sorted(done)
    assert [item[0] for item in run(2, argv)] == [0, 0]
    assert records(output) == undisturbed and report(output)["resumed"] == len(done)


def test_a_job_that_can_finish_what_is_left_after_sigterm_is_done(job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    argv = command(job, output, "--set", f"scheduler.max_sequences={ALL}")
    outcomes = run(2, argv, (1, 2, "SIGTERM"))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert records(output) == undisturbed


@pytest.mark.long
def test_a_replica_waits_for_another_one_longer_than_for_a_collective(job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    settings = ["--set", "parallel.expert=1", "--set", "runtime.timeout_s=2"]
    outcomes = run(2, command(job, output, *settings), (1, 3, "sleep"))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert records(output) == undisturbed


@pytest.mark.long
def test_a_replica_that_waits_for_one_that_was_stopped_exits_too(job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    argv = command(job, output, "--set", "parallel.expert=1", "--set", "runtime.drain_s=0")
    outcomes = run(2, argv, (1, 3, "sleep SIGTERM"))
    assert [code for code, _, _ in outcomes] == [1, 143]
    assert "rank 1 exited: stopped by SIGTERM" in outcomes[0][2]
    assert [item[0] for item in run(2, argv)] == [0, 0]
    assert records(output) == undisturbed


def test_a_full_disk_ends_all_ranks_and_keeps_the_ledger(job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    outcomes = run(2, command(job, output), (1, 3, "disk full"))
    assert [code for code, _, _ in outcomes] == [1, 1]
    assert all("No space left on device" in err for _, _, err in outcomes)
    assert "rank 1 exited" in outcomes[0][2]
    done = committed(output, 2)
    assert 0 < len(done) < ALL and not output.exists()
    assert [item[0] for item in run(2, command(job, output))] == [0, 0]
    assert records(output) == undisturbed and report(output)["resumed"] == len(done)


def test_a_finished_job_is_not_run_again_unless_asked_to(job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    assert run(1, command(job, output))[0][0] == 0
    changed = output.stat().st_mtime_ns
    for code, out, _ in run(2, command(job, output)):
        assert code == 0 and ("already complete" in out or out == "")
    assert output.stat().st_mtime_ns == changed
    hot = ("--set", "sampling.max_new_tokens=3")
    ((code, _, err),) = run(1, command(job, output, *hot))
    assert code == 2 and "sampling.max_new_tokens was 12, is 3" in err
    assert records(output) == undisturbed
    assert run(1, command(job, output, "--overwrite", *hot))[0][0] == 0
    assert records(output) != undisturbed and len(records(output)) == ALL


def test_a_second_process_on_the_same_output_is_refused(job, tmp_path):
    output = tmp_path / "out.jsonl"
    held = Ledger(output)
    outcomes = run(2, command(job, output))
    held.close()
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert "is being run by another process" in outcomes[0][2] and outcomes[1][2] == ""


def test_an_empty_input_makes_an_empty_output_without_loading_the_model(job, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n")
    output = tmp_path / "out.jsonl"
    argv = ["--config", str(job / "config.yaml"), "--input", str(tmp_path / "in.jsonl")]
    assert [item[0] for item in run(2, [*argv, "--output", str(output)])] == [0, 0]
    assert output.read_text() == ""


def test_what_is_wrong_with_the_files_is_reported_once_before_anything_runs(job, tmp_path):
    config, real = ["--config", str(job / "config.yaml")], str(job / "in.jsonl")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        f"--input {tmp_path}/no.jsonl: does not exist": (f"{tmp_path}/no.jsonl", "out"),
        f"--output {tmp_path}/out: is in the folder that is the input": (str(tmp_path), "out"),
        f"--input {tmp_path}/empty: ": (f"{tmp_path}/empty", "out"),
        f"the directory {tmp_path}/missing does not exist": (real, "missing/out"),
        f"the directory {tmp_path}/file does not exist": (real, "file/out"),
        f"--output {tmp_path}: is not a regular file": (real, "."),
        f"--output {real}: is the input": (real, real),
        "/proc/self/out.parts: No such file or directory": (real, "/proc/self/out"),
        "--input needs --output": (real, None),
    }
    argvs = []
    for source, target in cases.values():
        more = [] if target is None else ["--output", str(tmp_path / target)]
        argvs.append([*config, "--input", source, *more])
    outcomes, others = run_ranks(infer_each, 2, argvs, timeout=120.0)
    for message, (code, _, err), (other, _, quiet) in zip(cases, outcomes, others, strict=True):
        assert (code, other) == (2, 2), err + quiet
        assert message in err and err.startswith("error: ") and quiet == "", err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_rank_whose_peer_never_arrives_names_it_and_exits(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    done = subprocess.run(
        [sys.executable, "launch/infer.py", "--config", str(job / "config.yaml"), "--set"]
        + ["runtime.timeout_s=2"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 1
    assert "rank 1 of 2 did not join within 2 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_an_input_built_in_prompts_are_completed(job, tmp_path):
    output = tmp_path / "out.jsonl"
    argv = ["--config", str(job / "config.yaml"), "--output", str(output)]
    (code, out, err), (other, quiet, _) = run(2, argv)
    assert (code, other, quiet) == (0, 0, ""), err
    assert "The capital of France is" in out
    lines = records(output)
    assert [line["id"] for line in lines] == list(range(len(lines)))
    assert all(line["finish_reason"] == "length" for line in lines)
    ((code, _, err),) = run(1, argv)
    assert code == 2 and "exists; use --overwrite" in err
    assert run(1, [*argv, "--overwrite"])[0][0] == 0


def test_the_script_runs_by_hand_is_killed_and_resumes(job, undisturbed, tmp_path):
    """No launcher and no helper: the command a user types, and kill -9 from outside."""
    output = tmp_path / "out.jsonl"
    argv = [sys.executable, str(ROOT / "launch/infer.py"), *command(job, output)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(argv, cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL)
    shard = shard_path(shards_dir(output), 0)
    deadline = time.monotonic() + 120
    while process.poll() is None and not (shard.exists() and shard.stat().st_size):
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = len(committed(output, 1)) if shard.exists() else ALL
    again = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert records(output) == undisturbed
    if done < ALL:
        assert report(output)["resumed"] == done


def killed(job: Path, output: Path, config: Path, write: int = 3) -> list[str]:
    """Kill a job of one rank in that write to its ledger; return its command line."""
    files = ["--input", str(job / "in.jsonl"), "--output", str(output)]
    argv = ["--config", str(config), *files]
    with pytest.raises(RanksFailed):
        run(1, argv, (0, write, "kill after"))
    return argv


@pytest.fixture
def own_model(job, tmp_path) -> Path:
    """A copy of the job's model, to be changed, with a config next to it."""
    shutil.copytree(job / "model", tmp_path / "model")
    text = (job / "config.yaml").read_text()
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(str(job / "model"), str(tmp_path / "model")))
    return path


def test_a_job_whose_weights_were_replaced_is_refused_until_they_are_back(
    job, undisturbed, own_model, tmp_path
):
    output, weights = tmp_path / "out.jsonl", tmp_path / "model" / "model.safetensors"
    argv = killed(job, output, own_model)
    data = weights.read_bytes()
    weights.write_bytes(data[:-64] + bytes(64))
    for code, _, err in run(2, argv):
        assert code == 2 and "Traceback" not in err
    ((code, _, err),) = run(1, argv)
    assert code == 2 and f"{weights} was replaced" in err and "another job" in err
    weights.write_bytes(data)
    assert [item[0] for item in run(2, argv)] == [0, 0]
    assert records(output) == undisturbed
    weights.write_bytes(data[:-64] + bytes(64))
    ((code, _, err),) = run(1, argv)
    assert code == 2 and f"{weights} was replaced" in err, "a finished output is of its model, too"


def test_a_job_begun_before_fingerprints_resumes_with_one_warning_and_gains_one(
    job, undisturbed, own_model, tmp_path
):
    output = tmp_path / "out.jsonl"
    argv = killed(job, output, own_model)
    path = shards_dir(output) / "manifest.json"
    manifest = json.loads(path.read_text())
    files = manifest.pop("files")
    path.write_text(json.dumps(manifest))
    ((code, _, err),) = run(1, argv, (0, 2, "SIGTERM"))
    assert code in (0, 143) and err.count("did not record the model's files") == 1
    assert code == 0 or json.loads(path.read_text()) == {**manifest, "files": files}
    ((code, _, err),) = run(1, argv)
    assert code == 0 and "did not record" not in err
    assert records(output) == undisturbed
    assert json.loads(output.with_name("out.jsonl.job.json").read_text())["files"] == files


def test_an_input_that_is_no_jsonl_is_refused_before_the_model_is_loaded(job, tmp_path):
    lines = ("\n".join(GOOD) + "\n").encode()
    cases = {
        "is compressed with bzip2": bz2.compress(lines),
        "seems to be UTF-16": lines.decode().encode("utf-16"),
        "seems to be one JSON array": f"[{','.join(GOOD)}]".encode(),
        "seems to be CSV": b"id,prompt\n1,hello\n",
    }
    argvs = []
    for number, content in enumerate(cases.values()):
        path = tmp_path / f"in-{number}"
        path.write_bytes(content)
        files = ["--input", str(path), "--output", str(tmp_path / "out.jsonl")]
        argvs.append(["--config", str(job / "config.yaml"), *files])
    outcomes, others = run_ranks(infer_each, 2, argvs, timeout=120.0)
    for (message, argv), (code, _, err), (other, _, quiet) in zip(
        zip(cases, argvs, strict=True), outcomes, others, strict=True
    ):
        assert (code, other, quiet) == (2, 2, ""), err
        assert err.startswith(f"error: --input {argv[3]}: {message}"), err
    assert not list(tmp_path.glob("out*"))


def test_text_without_a_tokenizer_is_refused_before_the_model_is_loaded(own_model, job, tmp_path):
    for path in (tmp_path / "model").glob("*token*"):
        path.unlink()
    texts = tmp_path / "in.jsonl"
    texts.write_text("\n".join([*GOOD[:5], BAD[1], ""]))
    argv = ["--config", str(own_model), "--output", str(tmp_path / "out.jsonl"), "--input"]
    (code, _, err), (other, _, quiet) = run(2, [*argv, str(texts)])
    assert (code, other, quiet) == (2, 2, ""), err
    assert f"{texts}: its first 5 requests are text" in err and "set model.tokenizer" in err
    assert not (tmp_path / "out.jsonl.parts").exists()
    # Some lines run without a tokenizer, so the others become error records.
    ((code, _, err),) = run(1, [*argv, str(job / "in.jsonl")])
    assert code == 0, err


def test_settings_that_cannot_be_honoured_are_refused_before_the_model_is_loaded(job, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    listening = socket.create_server(("127.0.0.1", 0))
    taken = listening.getsockname()[1]
    cases = [
        ("profiler.spans=/proc/none", "profiler.spans = '/proc/none': cannot be written on "),
        (f"profiler.spans={file}", f"profiler.spans = '{file}': cannot be written on "),
        (f"profiler.metrics_port={taken}", f"rank 0: profiler.metrics_port = {taken}: cannot "),
        ("profiler.metrics_host=no.such.invalid", "rank 0: profiler.metrics_host = 'no.such"),
        ("profiler.spans_mib=1e308", "profiler.spans_mib = 1e+308: must be finite and above 0"),
        ("scheduler.kv_cache_gib=1e300", "scheduler.kv_cache_gib = 1e+300: must be finite"),
        (f"scheduler.kv_cache_blocks={10**30}", "scheduler.kv_cache_blocks = 1000000000000"),
        ("runtime.threads=1000000", "runtime.threads = 1000000: must be at least 1 and"),
        ("runtime.threads=0", "runtime.threads = 0: must be at least 1 and at most 1024"),
        ("runtime.timeout_s=1e12", "runtime.timeout_s = 1000000000000.0: must be finite and"),
        ("runtime.drain_s=-1", "runtime.drain_s = -1.0: must be finite and at least 0"),
        ("moe.capacity.factor=1e-999999999", "moe.capacity.factor = '1e-999999999': must be"),
    ]
    argvs = []
    for number, (setting, _) in enumerate(cases):
        port = ["--set", "profiler.metrics_port=0"] if "metrics_host" in setting else []
        output = tmp_path / f"out-{number}.jsonl"
        argvs.append(command(job, output, *port, "--set", setting))
    outcomes, others = run_ranks(infer_each, 2, argvs, timeout=120.0)
    listening.close()
    for (_, message), (code, _, err), (other, _, quiet) in zip(
        cases, outcomes, others, strict=True
    ):
        assert (code, other, quiet) == (2, 2, ""), err
        assert err.startswith(f"error: {message}") and "Traceback" not in err, err
    assert not list(tmp_path.glob("out-*.jsonl"))


def test_a_job_whose_every_line_failed_exits_with_3_on_every_rank(job, tmp_path):
    bad, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad.write_text("\n".join([BAD[1], BAD[2], BAD[3]]))
    argv = ["--config", str(job / "config.yaml"), "--input", str(bad), "--output", str(output)]
    (code, out, err), (other, _, quiet) = run(2, argv)
    assert (code, other, quiet) == (3, 3, ""), err
    assert "3 requests, 3 with an error record." in out
    assert (
        f"error: every line failed: 3 of 3 records are errors; their messages are in {output}"
        in err
    )
    assert len(records(output)) == 3 and not shards_dir(output).exists()
    ((code, out, _),) = run(1, argv)
    assert code == 3 and "already complete" in out, "the same however often it is asked"


def test_a_file_system_without_directory_syncs_and_locks_is_reported_and_no_error(
    job, undisturbed, tmp_path
):
    program = """
import errno, fcntl, os, runpy, stat, sys
sync = os.fsync
def fail(*arguments): raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
os.fsync = lambda fd: fail() if stat.S_ISDIR(os.fstat(fd).st_mode) else sync(fd)
fcntl.flock = fcntl.lockf = fail
sys.argv[0] = "launch/infer.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    output = tmp_path / "out.jsonl"
    argv = [sys.executable, "-c", program, *command(job, output)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert records(output) == undisturbed
    for folder, what in (
        (shards_dir(output), "lock files"),
        (shards_dir(output), "sync directories"),
        (tmp_path, "sync directories"),
    ):
        assert done.stderr.count(f"{folder}: this file system does not {what} (Invalid arg") == 1


def test_error_records_are_run_again_in_place_also_by_a_run_that_is_killed(
    job, undisturbed, tmp_path
):
    output = tmp_path / "out.jsonl"
    assert run(1, command(job, output))[0][0] == 0
    first, errors = output.read_bytes(), len(BAD)
    ((code, out, _),) = run(1, command(job, output))
    assert code == 0 and f"{errors} of its {ALL} records are errors: --retry-errors runs" in out
    again = command(job, output, "--retry-errors")
    with pytest.raises(RanksFailed):
        run(1, again, (0, 1, "kill after"))
    done = committed(output, 1)
    assert ALL - errors < len(done) <= ALL and output.read_bytes() == first
    outcomes = run(2, again)
    assert [item[0] for item in outcomes] == [0, 0], outcomes
    printed = " ".join(outcomes[0][1].split())
    counts = (
        f"{len(done)} of them by earlier runs, {errors} run again after an error, {errors} with"
    )
    assert f"{ALL} requests, {counts} an error record." in printed
    assert output.read_bytes() == first and records(output) == undisturbed
    values = report(output)
    assert (values["retried"], values["requests"]) == (errors, ALL - len(done))
    rounds = json.loads(output.with_name("out.jsonl.job.json").read_text())["retries"]
    assert [each["records"] for each in rounds] == [errors], "killed, it was one round"
    assert [item[0] for item in run(2, again)] == [0, 0]
    assert report(output)["requests"] == errors, "another request is another round"


def test_a_retry_of_which_every_line_fails_again_exits_with_3(job, tmp_path):
    bad, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad.write_text("\n".join(BAD[1:]))
    files = ["--input", str(bad), "--output", str(output)]
    argv = ["--config", str(job / "config.yaml"), *files]
    assert run(1, argv)[0][0] == 3
    ((code, _, err),) = run(1, [*argv, "--retry-errors"])
    assert code == 3 and "every line failed: 3 of 3" in err
    assert report(output)["retried"] == 3


def test_a_retry_that_contradicts_itself_is_refused_on_all_ranks(job, tmp_path):
    output = tmp_path / "out.jsonl"
    config = ["--config", str(job / "config.yaml"), "--retry-errors"]
    cases = {
        "error: --retry-errors --overwrite: the first keeps": command(
            job, output, "--retry-errors", "--overwrite"
        ),
        "error: --retry-errors needs --input": config,
    }
    outcomes, others = run_ranks(infer_each, 2, list(cases.values()), timeout=120.0)
    for message, (code, _, err), (other, _, quiet) in zip(cases, outcomes, others, strict=True):
        assert (code, other, quiet) == (2, 2, ""), err
        assert err.startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("event", ["kill before", "kill inside", "kill after", "SIGTERM"])
@pytest.mark.long
def test_lines_that_failed_for_a_small_kv_cache_succeed_in_a_retry_that_is_stopped(
    job, undisturbed, tmp_path, event
):
    output = tmp_path / "out.jsonl"
    small = ("--set", "scheduler.kv_cache_blocks=2")
    assert run(2, command(job, output, *small))[0][0] == 0
    first = records(output)
    failed = [place for place in range(ALL) if "KV cache holds 32" in str(first[place])]
    kept = {place for place in range(ALL) if first[place]["finish_reason"] != "error"}
    assert len(failed) > 3 and len(kept) > 3
    before = output.read_bytes()
    settings = ["--set", "runtime.drain_s=0"]
    again = command(job, output, "--retry-errors", *settings)
    if event == "SIGTERM":
        assert [code for code, _, _ in run(2, again, (1, 2, event))] == [143, 143]
    else:
        with pytest.raises(RanksFailed):
            run(2, again, (0, 2, event))
    done = committed(output, 2)
    assert kept <= done and len(done) < ALL and output.read_bytes() == before
    assert [item[0] for item in run(2, again)] == [0, 0]
    assert records(output) == undisturbed
    assert {output.read_bytes().splitlines()[place] for place in kept} == {
        before.splitlines()[place] for place in kept
    }
    values = report(output)
    assert (values["requests"], values["resumed"]) == (ALL - len(done), len(done))
    assert (values["retried"], values["errors"]) == (ALL - len(kept), len(BAD))
