"""Generation settings of the harness. Run: pytest tests/unit/interop/test_lm_eval_settings.py"""

from __future__ import annotations

import pytest

from engine.config import SamplingConfig
from tests.helpers.lm_eval_case import needs_lm_eval

pytestmark = needs_lm_eval
CONFIG = SamplingConfig(temperature=0.7, top_p=0.5, seed=5)


def generation(**given):
    from engine.interop.lm_eval_settings import Generation

    return Generation.of(given, 256, "</s>", CONFIG)


def test_a_task_decides_and_the_config_gives_the_seed_alone():
    made = generation(until=["\n\n"], max_gen_toks=7, do_sample=False, temperature=0.0)
    params = made.params
    assert (params.max_new_tokens, params.temperature, params.top_p) == (7, 0.0, 1.0)
    assert params.seed == 5
    assert params.stop == ("\n\n",)
    assert made.until == ("\n\n", "</s>")


def test_what_a_task_leaves_out_is_greedy_and_256_tokens():
    params = generation(until="Q:").params
    assert (params.max_new_tokens, params.temperature, params.stop) == (256, 0.0, ("Q:",))


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_number_of_new_tokens_is_understood(name):
    assert generation(until=[], **{name: 3}).params.max_new_tokens == 3


def test_sampling_takes_its_temperature_and_filters():
    params = generation(until=[], do_sample=True, temperature=0.6, top_p=0.9, top_k=20).params
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 20)
    assert generation(until=[], do_sample=True).params.temperature == 1.0
    assert generation(until=[], do_sample=False, temperature=0.6).params.temperature == 0.0
    assert generation(until=[], temperature=0.6).params.temperature == 0.6


def test_settings_without_effect_pass_and_others_are_named():
    assert generation(until=[], num_beams=1, use_cache=True).params.greedy
    with pytest.raises(ValueError, match="generation_kwargs: 'num_beams' is not a sampling"):
        generation(until=[], num_beams=4)
    with pytest.raises(ValueError, match="generation_kwargs: .*temperature"):
        generation(until=[], do_sample=True, temperature=-1.0)
