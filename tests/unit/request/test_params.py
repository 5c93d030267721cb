"""Sampling parameters are checked. Run: pytest tests/unit/request/test_params.py"""

from dataclasses import fields

import numpy as np
import pytest
import torch

from engine.config import SamplingConfig
from engine.request import SamplingParams


def test_sampling_params_have_exactly_the_fields_and_defaults_of_the_config():
    of_config = {field.name: field.default for field in fields(SamplingConfig)}
    of_params = {field.name: field.default for field in fields(SamplingParams)}
    assert {name: of_params.pop(name) for name in of_config} == of_config
    assert set(of_params) == {"echo", "logit_bias", "n"}  # asked for by request alone


def test_a_number_of_logprobs_asks_for_so_many_likeliest_tokens():
    params = SamplingParams(logprobs=5, prompt_logprobs=0)
    assert (params.logprobs, params.top_logprobs) == (True, 5)
    assert (params.prompt_logprobs, params.prompt_top_logprobs) == (True, 0)
    with pytest.raises(ValueError, match="logprobs = 5: differs from top_logprobs = 3"):
        SamplingParams(logprobs=5, top_logprobs=3)


def test_echo_with_logprobs_asks_for_the_prompts_too():
    params = SamplingParams(echo=True, logprobs=3)
    assert (params.prompt_logprobs, params.prompt_top_logprobs) == (True, 3)
    assert not SamplingParams(echo=True).prompt_logprobs


def test_likeliest_tokens_without_logprobs_are_refused():
    with pytest.raises(ValueError, match="^top_logprobs = 2: needs logprobs: true"):
        SamplingParams(top_logprobs=2)
    with pytest.raises(ValueError, match="^prompt_top_logprobs = 2: needs prompt_logprobs: true"):
        SamplingParams(prompt_top_logprobs=2)


def test_overrides_replace_the_config_and_none_keeps_it():
    config = SamplingConfig(temperature=0.5, top_k=7, stop=("a",))
    params = SamplingParams.from_config(config, temperature=0.0, top_k=None, stop=["x", "y"])
    assert (params.temperature, params.top_k, params.stop) == (0.0, 7, ("x", "y"))
    assert SamplingParams.from_config(config, stop="end").stop == ("end",)
    assert SamplingParams.from_config(config).stop == ("a",)


def test_an_unknown_override_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="'temprature'.*did you mean 'temperature'"):
        SamplingParams.from_config(SamplingConfig(), temprature=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", True),
        ("max_new_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {3: 101}),
        ("logit_bias", {-3: 1}),
        ("logit_bias", {3: "1"}),
        ("logit_bias", [3]),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("ignore_eos", 1),
        ("logprobs", None),
        ("prompt_logprobs", 5.0),
        ("top_logprobs", -1),
        ("top_logprobs", 101),
        ("echo", 1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} = .*: must be "):
        SamplingParams(**{name: value})


def test_token_ids_of_a_bias_may_be_text_and_minus_one_turns_top_k_off():
    params = SamplingParams(logit_bias={"3": -100, 4: 2.5}, top_k=-1)
    assert (params.logit_bias, params.top_k) == ({3: -100, 4: 2.5}, 0)


def test_a_default_does_not_contradict_what_a_request_asks_for():
    config = SamplingConfig(logprobs=True, top_logprobs=5, min_tokens=10)
    off = SamplingParams.from_config(config, logprobs=False, max_new_tokens=4)
    assert (off.logprobs, off.top_logprobs, off.min_tokens) == (False, 0, 4)
    assert SamplingParams.from_config(config, logprobs=2).top_logprobs == 2
    assert SamplingParams.from_config(config, logprobs=True).top_logprobs == 5


def test_the_widest_values_are_accepted():
    params = SamplingParams(max_new_tokens=0, temperature=1e-9, top_p=1, top_k=0, seed=2**63 - 1)
    assert not params.greedy
    assert SamplingParams(temperature=2.0, top_k=1).greedy
    assert SamplingParams(temperature=0).greedy


@pytest.mark.parametrize(
    "stop_token_ids", [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), [np.int64(3), 1]]
)
def test_stops_may_be_lists_arrays_and_one_text(stop_token_ids):
    params = SamplingParams(stop=["a", "b"], stop_token_ids=stop_token_ids)
    assert params.stop == ("a", "b") and params.stop_token_ids == (3, 1)
    assert all(type(token) is int for token in params.stop_token_ids)
    assert SamplingParams(stop="end").stop == ("end",)
