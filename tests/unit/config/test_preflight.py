"""engine/config/preflight.py: a config that cannot run here is refused with what to do about it."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.config.host_devices import LocalRank, local_rank_of
from engine.config.loader import load_config
from engine.config.preflight import TINY_COMMAND, check_runnable, read_num_experts
from engine.config.validation import ConfigError


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.fixture
def num_gpus(monkeypatch):
    """Set how many GPUs torch sees."""

    def set_number(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return set_number


def config_of(path, device="cpu", **model) -> Config:
    return Config(model=ModelConfig(path=str(path), **model), runtime=RuntimeConfig(device=device))


def refusal(config: Config, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_runnable(config, environ or {})
    return str(caught.value)


def test_a_checkpoint_on_a_cpu_raises_no_error(checkpoint):
    check_runnable(config_of(checkpoint), {})
    check_runnable(config_of(checkpoint, tokenizer=str(checkpoint)), {"LOCAL_WORLD_SIZE": "8"})


def test_a_policy_that_is_not_there_is_named_and_takes_the_place_of_the_placement(
    checkpoint, tmp_path
):
    config = config_of(checkpoint)
    wrong = replace(config, moe=replace(config.moe, policy="no/p.yaml", placement="no/place.yaml"))
    text = refusal(wrong)
    assert "moe.policy = 'no/p.yaml': no such file; name a policy file" in text
    assert "moe.placement" not in text
    (tmp_path / "p.yaml").write_text("")
    moe = replace(wrong.moe, policy=str(tmp_path / "p.yaml"))
    check_runnable(replace(config, moe=moe), {})


def test_a_real_model_without_gpu_and_checkpoint_names_both_and_the_tiny_config(num_gpus):
    num_gpus(0)
    text = refusal(load_config("mixtral_ep8", ["model.path=/no/such/Mixtral"]))
    assert "model.path = '/no/such/Mixtral': no such directory" in text
    assert "--set model.path=DIR" in text
    assert "runtime.device = 'cuda'" in text and "--set runtime.device=cpu" in text
    assert text.endswith(TINY_COMMAND)


def test_the_tiny_command_names_a_config_that_is_shipped_for_its_number_of_ranks():
    words = TINY_COMMAND.split()
    config = load_config(words[-1])
    assert config.parallel.expert == int(words[words.index("--nproc-per-node") + 1])


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "holds no config.json, so it is no checkpoint; name the folder that has"),
        ("model.safetensors", "--set model.load_format=dummy"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(checkpoint, removed, message):
    (checkpoint / removed).unlink()
    assert message in refusal(config_of(checkpoint))


def test_dummy_weights_without_weight_files_raise_no_error(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    check_runnable(config_of(checkpoint, load_format="dummy"), {})


def test_a_tokenizer_that_is_not_there_is_refused(checkpoint):
    text = refusal(config_of(checkpoint, tokenizer="/no/such"))
    assert "model.tokenizer = '/no/such': no such directory" in text
    assert "--set model.tokenizer=null" in text


def test_an_environment_variable_in_a_path_that_is_missing_is_said_to_be_literal():
    text = refusal(config_of("$SCRATCH/model", tokenizer="${HOME}/tokenizer"))
    assert text.count("no such directory (environment variables are not expanded)") == 2


def test_paths_that_the_file_system_refuses_are_refused_like_missing_ones():
    text = refusal(config_of("x" * 5000, tokenizer="y" * 5000))
    assert text.count("no such directory") == 2


def test_a_bundled_checkpoint_that_is_missing_is_not_replaced_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refusal(config_of("configs/checkpoints/tiny_gone"))
    assert "git checkout -- configs" in text and TINY_COMMAND not in text


@pytest.mark.parametrize("value", [0, -1, True, None, "8", 8.0, [8]])
def test_a_number_of_experts_that_is_none_is_named_by_field(checkpoint, value):
    (checkpoint / "config.json").write_text(json.dumps({"num_experts": value}))
    with pytest.raises(ConfigError) as caught:
        read_num_experts(checkpoint)
    assert f"num_experts = {value!r} in config.json: must be a whole number" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "cannot read config.json"),
        ("[]", "must hold one JSON object"),
        ("3", "must hold one JSON object"),
        ("null", "must hold one JSON object"),
        ("{}", "has no number of experts"),
    ],
)
def test_a_config_json_without_a_number_of_experts_is_refused_in_words(checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_num_experts(checkpoint)


def test_the_number_of_experts_is_found_beside_another_models_name(checkpoint):
    values = {"num_local_experts": None, "num_experts": 0, "n_routed_experts": 64}
    (checkpoint / "config.json").write_text(json.dumps(values))
    assert read_num_experts(checkpoint) == 64


def test_more_threads_than_a_host_of_this_size_runs_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    config = config_of(checkpoint)
    check_runnable(replace(config, runtime=RuntimeConfig(device="cpu", threads=64)), {})
    text = refusal(replace(config, runtime=RuntimeConfig(device="cpu", threads=65)))
    assert "runtime.threads = 65: this host has 4 CPU cores" in text


def torchrun(local_rank: int, num_ranks: int) -> dict[str, str]:
    return {
        "RANK": str(local_rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }


def deepspeed(local_rank: int, num_ranks: int) -> dict[str, str]:
    environ = torchrun(local_rank, num_ranks)
    return environ | {"LOCAL_SIZE": environ.pop("LOCAL_WORLD_SIZE")}


def openmpi(local_rank: int, num_ranks: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(num_ranks),
    }


def hydra(local_rank: int, num_ranks: int) -> dict[str, str]:
    return {
        "PMI_RANK": str(local_rank),
        "MPI_LOCALRANKID": str(local_rank),
        "MPI_LOCALNRANKS": str(num_ranks),
    }


def srun(local_rank: int, num_ranks: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(local_rank),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": f"{num_ranks}(x2)",
        "SLURM_NTASKS_PER_NODE": str(num_ranks),
    }


LAUNCHERS = [torchrun, deepspeed, openmpi, hydra, srun]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_more_ranks_than_gpus_on_a_host_are_refused(checkpoint, num_gpus, launcher):
    num_gpus(4)
    config = config_of(checkpoint, device="cuda")
    check_runnable(config, launcher(3, 4))
    text = refusal(config, launcher(3, 8))
    assert "8 ranks on this host but 4 visible GPUs" in text


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_sees_one_gpu_alone_raises_no_error(checkpoint, num_gpus, launcher):
    """`srun --ntasks-per-node 8 --gpus-per-task 1`, or a wrapper that shows each rank its own."""
    num_gpus(1)
    check_runnable(config_of(checkpoint, device="cuda"), launcher(7, 8))


@pytest.mark.parametrize(
    "setting",
    [
        {"SLURM_GPUS_PER_TASK": "2"},
        {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=2"},
        {"SLURM_GPU_BIND": "per_task:2"},
    ],
)
def test_tasks_that_see_several_gpus_of_their_own_raise_no_error(checkpoint, num_gpus, setting):
    num_gpus(2)
    config = config_of(checkpoint, device="cuda")
    check_runnable(config, srun(3, 4) | setting)
    assert "4 ranks on this host" in refusal(config, torchrun(3, 4) | setting)


# Left by salloc or sbatch for every process of the allocation, also one without a launcher.
ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_GPUS_PER_TASK": "1",
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},  # a batch script
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
        {"SLURM_NTASKS_PER_NODE": "8(x2)"},
        {"LOCAL_WORLD_SIZE": "8"},  # exported by hand, without RANK
    ],
)
def test_one_process_inside_an_allocation_is_one_rank(checkpoint, num_gpus, more):
    num_gpus(1)
    check_runnable(config_of(checkpoint, device="cuda"), ALLOCATION | more)
    num_gpus(2)
    check_runnable(config_of(checkpoint, device="cuda"), ALLOCATION | more)


@pytest.mark.parametrize(
    ("changes", "num_ranks"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_NODEID": "1"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),3", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": ..., "SLURM_TASKS_PER_NODE": "4,2"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": ..., "SLURM_NODEID": "1"}, 6),
        ({"SLURM_STEP_TASKS_PER_NODE": ..., "SLURM_NTASKS_PER_NODE": "4,2"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": ..., "SLURM_NTASKS_PER_NODE": "3(x2)"}, 3),
    ],
)
def test_the_tasks_of_this_node_are_counted(changes, num_ranks):
    environ = {name: value for name, value in (srun(1, 6) | changes).items() if value is not ...}
    assert local_rank_of(environ) == LocalRank(1, num_ranks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "eight"}, "SLURM_STEP_TASKS_PER_NODE='eight' is not of the"),
        ({"SLURM_STEP_TASKS_PER_NODE": "9" * 5000}, "is not of the form"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID='x'"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2 is outside SLURM_STEP_TASKS_PER_NODE=6(x2)"),
        ({"SLURM_LOCALID": "9" * 5000}, "must be a whole number"),
    ],
)
def test_wrong_counts_of_slurm_are_named(checkpoint, num_gpus, changes, message):
    num_gpus(8)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_runnable(config_of(checkpoint, device="cuda"), srun(1, 6) | changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("CUDA_VISIBLE_DEVICES", "-1,0"),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles"),
        ("HIP_VISIBLE_DEVICES", ""),
        ("ROCR_VISIBLE_DEVICES", "-1"),
    ],
)
def test_a_variable_that_hides_all_gpus_is_named(checkpoint, num_gpus, monkeypatch, name, value):
    num_gpus(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = refusal(config_of(checkpoint, device="cuda"), {name: value})
    assert f"sees no GPU: {name}={value!r} in the environment hides all of them" in text


def test_gpus_that_no_variable_hides_are_just_not_there(checkpoint, num_gpus, monkeypatch):
    num_gpus(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = refusal(config_of(checkpoint, device="cuda"), {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "sees no GPU; run where there are GPUs" in text
