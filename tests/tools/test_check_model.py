"""tools/check_model.py and `lockstep check-model`: what is printed, and the exit codes.

Run: pytest tests/tools/test_check_model.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_random_checkpoint import FAMILIES, make_checkpoint

from engine.model_check import report
from tests.helpers.sparse_checkpoint import deepseek_v3, mixtral_8x7b, olmoe_7b, write_sparse

ROOT = Path(__file__).resolve().parents[2]
TOOL = (str(ROOT / "tools" / "check_model.py"),)
COMMAND = ("-m", "lockstep", "check-model")


def run(*arguments: str, program: tuple[str, ...] = TOOL) -> tuple[int, str, str]:
    path = f"{ROOT / 'launch'}{os.pathsep}{ROOT}"
    result = subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=240,  # a minute at most on a busy machine; reading weights would take hours
        env={**os.environ, "PYTHONPATH": path},
    )
    assert "Traceback" not in result.stdout + result.stderr
    return result.returncode, result.stdout, result.stderr


def test_671b_in_bfloat16_runs_and_a_line_per_number_of_ranks_is_printed(tmp_path):
    folder = write_sparse(tmp_path, *deepseek_v3(fp8=False), shards=8)
    code, text, _ = run(str(folder))
    assert code == 0 and text.startswith(f"{folder} (deepseek_v3): runs\n")
    assert "671.0B, 36.6B active per token (" in text
    assert "on GPUs of 139 GiB: fits on 16\n" in text
    table = text[text.index("per rank, in GiB") :].splitlines()[2:7]
    assert [line.split()[:2] for line in table] == [
        ["1", "256"], ["2", "128"], ["4", "64"], ["8", "32"], ["16", "16"],
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoints_that_transformers_writes_run(tmp_path, family):
    make_checkpoint(family, tmp_path, size="tiny")
    found = report.check(tmp_path, (1, 2), 1, "auto", (1.0,))
    assert found["runs"], found["problems"]
    assert not found["stored"]["unused"] and found["parameters"]["active"] > 0
    assert not any("problem" in row for row in found["ranks"])


def test_a_model_that_does_not_run_ends_with_1_and_says_why(tmp_path):
    config, tensors = olmoe_7b()
    config["hidden_act"] = "gelu"
    code, text, _ = run(str(write_sparse(tmp_path, config, tensors)), program=COMMAND)
    assert code == 1 and "does not run" in text and "  - hidden_act: 'gelu'" in text


def test_json_is_one_object(tmp_path):
    folder = write_sparse(tmp_path, *mixtral_8x7b())
    options = ("--ranks", "2,8", "--gpu-gib", "40", "--dtype", "float16", "--json")
    options += ("--quantization", "int4")
    code, text, _ = run(str(folder), *options, program=COMMAND)
    found = json.loads(text)
    assert code == 0 and found["runs"] and found["dtype"] == "float16"
    assert [row["ranks"] for row in found["ranks"]] == [2, 8]
    assert found["held"] == {"setting": "int4", "as": "int4"}
    assert 0 < found["ranks"][0]["kv_tokens"]["40"] < found["ranks"][1]["kv_tokens"]["40"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--ranks", "0"), "--ranks"),
        (("--ranks", "2,x"), "--ranks"),
        (("--tensor", "-1"), "--tensor"),
        (("--dtype", "int3"), "--dtype"),
        (("--quantization", "int3"), "--quantization"),
        (("--gpu-gib", "nan"), "--gpu-gib"),
        (("--weights",), "--weights"),
    ],
)
def test_wrong_options_end_with_2(tmp_path, options, names):
    code, text, error = run(str(tmp_path), *options)
    assert code == 2 and not text and names in error


def test_a_wrong_folder_ends_with_2(tmp_path):
    code, text, error = run(str(tmp_path / "none"))
    assert code == 2 and not text and "no such folder" in error
