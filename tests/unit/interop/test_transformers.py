"""Lockstep's experts inside transformers, one process: settings, versions and forms of experts.

Run: pytest tests/unit/interop/test_transformers.py
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers

from engine.config import CapacityConfig, MoEConfig, OverlapConfig
from engine.interop.transformers_ep import WORKS_WITH, register
from engine.interop.transformers_experts import experts_shape, take_weights
from engine.moe.expert_form import ExpertForm
from engine.ops.expert_ffn import expert_ffn
from tests.helpers.model_cases import CASES

expert_parallel = pytest.importorskip("transformers.distributed.expert_parallel")


def experts_of(name: str, **settings: Any) -> Any:
    """The experts of a tiny model's last layer, every number drawn."""
    config = CASES[name].config()
    for key, value in settings.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    experts = model.model.layers[-1].mlp.experts
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return experts


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            MoEConfig(capacity=CapacityConfig(policy="expanded_drop", factor="1")),
            "moe.capacity.policy = expanded_drop: needs the router's scores of all experts",
        ),
        (MoEConfig(overlap=OverlapConfig(chunks="auto")), "moe.overlap: chunks = auto"),
        (MoEConfig(policy="p.yaml"), "moe.policy = p.yaml: is for models that the engine runs"),
        (MoEConfig(placement="plan.json"), "moe.placement = plan.json: transformers gives each"),
    ],
)
def test_settings_that_need_the_engine_are_refused(config, text):
    with pytest.raises(ValueError, match="moe") as raised:
        register(config)
    assert text in str(raised.value)


def test_a_version_without_the_interface_is_refused_with_the_versions_that_work(monkeypatch):
    monkeypatch.delattr(expert_parallel, "EPImplementationInterface")
    with pytest.raises(ImportError) as raised:
        register()
    assert str(raised.value) == (
        f"transformers {transformers.__version__} has not the interface for expert parallelism "
        f"that Lockstep's is written for; install {WORKS_WITH}"
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("configuration_utils", "DistributedConfig"),
        ("expert_parallel", "EPImplementation"),
        ("expert_parallel", "EPImplementationInterface.register"),
    ],
)
def test_each_point_that_register_takes_from_transformers_is_checked(monkeypatch, module, name):
    holder = importlib.import_module(f"transformers.distributed.{module}")
    parent, _, last = name.rpartition(".")
    holder = getattr(holder, parent) if parent else holder
    owner = holder if not parent else next(each for each in holder.__mro__ if last in vars(each))
    monkeypatch.delattr(owner, last)
    check_versions()


def test_a_setting_of_another_name_is_refused_with_the_versions(monkeypatch):
    configuration = importlib.import_module("transformers.distributed.configuration_utils")
    renamed = dict(configuration.DistributedConfig.__dataclass_fields__)
    del renamed["ep_implementation"]
    monkeypatch.setattr(configuration.DistributedConfig, "__dataclass_fields__", renamed)
    check_versions()


def check_versions():
    with pytest.raises(ImportError) as raised:
        register()
    assert str(raised.value).endswith(f"written for; install {WORKS_WITH}")
    assert transformers.__version__ in str(raised.value)


def test_an_interface_with_other_arguments_is_refused(monkeypatch):
    def call(self, hidden_states, routing):
        raise NotImplementedError

    monkeypatch.setattr(expert_parallel.EPImplementation, "__call__", call)
    with pytest.raises(ImportError, match="install transformers>=5.23"):
        register()


@pytest.mark.parametrize(
    ("name", "settings", "form"),
    [
        ("mixtral", {}, ExpertForm()),
        ("mixtral", {"hidden_act": "gelu"}, ExpertForm(activation="gelu")),
        ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, ExpertForm(activation="gelu_tanh")),
        ("mixtral", {"hidden_act": "relu2"}, ExpertForm(activation="relu2")),
        ("gpt-oss", {}, ExpertForm(activation="gpt_oss", bias=True, limit=7.0)),
    ],
)
def test_the_form_of_experts_is_found_by_what_they_compute(name, settings, form):
    assert experts_shape(experts_of(name, **settings)).form == form


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_weights_taken_over_compute_what_the_module_computed(name):
    experts = experts_of(name)
    shape = experts_shape(experts)
    x_RD = torch.randn(6, shape.hidden, generator=torch.Generator().manual_seed(5))
    ids_RK = torch.tensor([[0], [0], [1], [2], [2], [3]])
    with torch.inference_mode():
        wanted = experts(x_RD, ids_RK, torch.ones(6, 1))
        taken = [list(each) for each in take_weights(experts, torch.float32)]
        biases = (taken[2], taken[3]) if shape.form.bias else (None, None)
        made = expert_ffn(x_RD, (taken[0], taken[1]), biases, shape.form.rule, [2, 1, 2, 1])
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert all(weight.is_meta for weight in experts.parameters())


def test_experts_with_an_activation_that_the_engine_lacks_are_refused():
    with pytest.raises(ValueError, match="MixtralExperts: its activation .QuickGELUActivation"):
        experts_shape(experts_of("mixtral", hidden_act="quick_gelu"))


def test_experts_with_further_parameters_are_refused():
    experts = experts_of("mixtral")
    experts.register_buffer("scale", torch.ones(4))
    with pytest.raises(ValueError, match="MixtralExperts: has or lacks scale beside gate_up_proj"):
        experts_shape(experts)


def test_quantised_experts_are_refused():
    experts = experts_of("mixtral").to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="gate_up_proj is float8_e4m3fn, and experts must be"):
        experts_shape(experts)


def test_experts_that_are_no_stacked_ones_are_refused():
    with pytest.raises(ValueError, match="Linear: is not one of transformers' stacked experts"):
        experts_shape(torch.nn.Linear(4, 4))
