"""Every example of docs/examples runs by its page's commands, in another directory, on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config.loader import load_config, parse_yaml
from engine.moe.placement.placement_file import parse_placement
from engine.moe.policy.policy_file import parse_policy, read_policy
from engine.weights.fingerprint import model_fingerprint

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(folder: Path, *command: str | Path) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_completes_its_prompts(tmp_path):
    out = run(tmp_path, EXAMPLES / "offline.py")
    assert out == (
        "sum: 47 + 38 = 85   [stop]\ncopy: ball water wave town => ball water wave town   [stop]\n"
    )


def test_two_ranks_complete_what_one_does(tmp_path):
    out = run(tmp_path, *TORCHRUN, EXAMPLES / "two_ranks.py")
    assert out == (
        "2 ranks share the experts\n"
        "sum: 47 + 38 = 85\ncopy: ball water wave town => ball water wave town\n"
    )


@pytest.mark.long
def test_a_transformers_model_prints_what_its_page_shows(tmp_path):
    out = run(tmp_path, *TORCHRUN, EXAMPLES / "in_transformers.py")
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    assert f"```\n{out}```" in page


def test_the_capacity_sweep_drops_more_with_every_smaller_factor(tmp_path):
    head, *rows = run(tmp_path, EXAMPLES / "capacity_sweep.py").splitlines()
    assert head.startswith("factor  dropped  gate mass kept")
    dropped = [float(row.split()[1].rstrip("%")) for row in rows]
    kept = [float(row.split()[2]) for row in rows]
    assert len(rows) == 5 and dropped[0] == 0 and kept[0] == 1
    assert dropped == sorted(dropped) and kept == sorted(kept, reverse=True) and dropped[-1] > 20
    assert rows[0].endswith("4 of 4")


def test_the_page_on_balance_shows_what_the_example_of_copies_prints(tmp_path):
    out = run(tmp_path, EXAMPLES / "copies_by_hand.py")
    page = (ROOT / "docs" / "balance.md").read_text()
    assert f"```\n{out}```\n" in page
    placement = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert placement is not None
    read = parse_placement(yaml.safe_load(placement[1]), "the page")
    assert read.layer(0).copies_E == ((1,), (2,), (), ())
    assert read.domains["text"].loads_E[0] == (20, 9, 4, 12)
    loads = re.findall(r"rows of the ranks: (.*)", out)
    assert loads == ["[11, 11, 11, 12]", "[12, 12, 9, 12]", "[9, 9, 9, 9]"]
    assert "kept under limits of 9 rows: [18, 6, 3, 9]" in out


def test_every_line_of_the_requests_is_completed_and_the_wrong_one_is_an_error_record(tmp_path):
    requests, output = EXAMPLES / "requests.jsonl", tmp_path / "out.jsonl"
    files = ["--input", requests, "--output", output]
    config = ["--config", "tiny_mixtral", "--set", "runtime.device=cpu"]
    run(tmp_path, ROOT / "launch" / "infer.py", *config, *files)
    records = {record["id"]: record for record in map(json.loads, output.open())}
    assert len(records) == len(requests.read_text().splitlines())
    assert records["sum"]["text"] == " 85" and records["copy"]["text"] == " ball water wave town"
    assert "temperature = -1" in records["wrong"]["error"]["message"]
    wrong = [key for key, record in records.items() if record["finish_reason"] == "error"]
    assert wrong == ["wrong"]


def test_a_batch_file_of_openai_is_answered_in_its_form_in_two_files(tmp_path):
    requests, output = EXAMPLES / "openai_batch.jsonl", tmp_path / "batch.jsonl"
    files = ["--input", requests, "--output", output]
    config = ["--config", "tiny_mixtral", "--set", "runtime.device=cpu"]
    run(tmp_path, ROOT / "launch" / "infer.py", *config, *files)
    text, chat = map(json.loads, output.open())
    assert text["custom_id"] == "openai" and chat["custom_id"] == "openai-chat"
    assert text["response"]["body"]["object"] == "text_completion"
    assert chat["response"]["body"]["choices"][0]["message"]["content"]
    (wrong,) = map(json.loads, (tmp_path / "batch.errors.jsonl").open())
    assert "temperature = -1" in wrong["response"]["body"]["error"]["message"]


def test_the_policy_limits_the_layers_that_it_names(tmp_path):
    output, policy = tmp_path / "out.jsonl", EXAMPLES / "policy.yaml"
    files = ["--input", EXAMPLES / "requests.jsonl", "--output", output]
    config = ["--config", "tiny_mixtral_ep2", "--set", "runtime.device=cpu"]
    out = run(
        tmp_path, *TORCHRUN, ROOT / "launch" / "infer.py", *config, *files,
        "--set", f"moe.policy={policy}",
    )  # fmt: skip
    assert f"The policy {policy} (hash " in out and "promised nothing" in out
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())["run"]
    assert report["policy"]["layers"].keys() == {"0", "2", "3"}
    assert report["layers"][0]["dropped"] > 0 and report["layers"][1]["dropped"] == 0
    job = json.loads((tmp_path / "out.jsonl.job.json").read_text())
    assert job["settings"]["moe.policy"] == report["policy"]["digest"]


def test_the_policy_on_its_page_is_one_and_names_the_bundled_model():
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    shown = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert shown is not None
    policy = parse_policy(parse_yaml(shown[1], "the page"), "the page")
    assert policy.layers == read_policy(EXAMPLES / "policy.yaml").layers
    assert policy.fingerprint == model_fingerprint(load_config("tiny_mixtral").model)


def test_the_page_names_every_example():
    page = (EXAMPLES / "index.md").read_text()
    named = set(re.findall(r"\]\(([\w.]+)\)", page))
    kinds = (".py", ".jsonl", ".yaml")
    assert named == {file.name for file in EXAMPLES.iterdir() if file.suffix in kinds}
