"""engine/config/preflight.py: a config that cannot run here is refused with what to do about it."""

import pytest
import torch

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.config.loader import load_config
from engine.config.preflight import TINY_COMMAND, check_runnable
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


@pytest.mark.parametrize(
    "name",
    ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"],
)
def test_more_ranks_than_gpus_on_a_host_are_refused(checkpoint, num_gpus, name):
    num_gpus(4)
    config = config_of(checkpoint, device="cuda")
    check_runnable(config, {name: "4"})
    text = refusal(config, {name: "8"})
    assert "8 ranks on this host but 4 visible GPUs" in text
