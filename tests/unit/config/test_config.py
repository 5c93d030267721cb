"""engine/config: what is accepted and how the rest is refused."""

import dataclasses
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.config import (
    CapacityConfig,
    Config,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    ProfilerConfig,
    RuntimeConfig,
    SamplingConfig,
    SchedulerConfig,
)
from engine.config import loader as config_io
from engine.config.loader import (
    PROJECT_ROOT,
    config_from_tree,
    digest,
    find_config,
    load_config,
    to_yaml,
)
from engine.config.validation import ConfigError
from engine.config.world_rules import expert_ranks, validate_capacity, validate_world

SHIPPED = sorted(file.stem for file in (PROJECT_ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path."""

    def write_config(text: str) -> str:
        file = tmp_path / "a.yaml"
        file.write_text(text)
        return str(file)

    return write_config


def load(*overrides: str) -> Config:
    return load_config("tiny_mixtral_ep2", list(overrides))


def problems_of(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return caught.value.problems


def test_a_minimal_file_gets_the_documented_defaults(write):
    config = load_config(write("model: {path: /some/where}"))
    assert config == Config(model=ModelConfig(path="/some/where"))
    assert (config.scheduler.max_batch_tokens, config.scheduler.block_size) == (2048, 16)
    assert (config.sampling.max_new_tokens, config.sampling.temperature) == (128, 0.0)
    assert config.moe.capacity.policy == "none" and config.moe.capacity.phases == ("prefill",)
    assert config.runtime.timeout_s == 120.0


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads_and_is_supported_on_its_number_of_ranks(name):
    config = load_config(name)
    expert = config.parallel.expert
    if "_ep" in name:
        assert expert == int(name.rpartition("_ep")[2])
    else:
        assert expert == "auto"
    for num_ranks in (1, 2, 3, 16) if expert == "auto" else (expert,):
        validate_world(config, num_ranks or 0)


def test_the_documented_configs_are_shipped():
    assert SHIPPED == [
        "deepseek_v2_lite_ep8",
        "deepseek_v3_ep8",
        "ernie45_21b_ep4",
        "glm45_air_ep8",
        "gpt_oss_120b_ep8",
        "kimi_k2_ep32",
        "llama4_scout_ep8",
        "longcat_flash_ep16",
        "minimax_m2_ep8",
        "mixtral_ep8",
        "olmoe_ep8",
        "qwen15_moe_ep4",
        "qwen36_35b_ep4",
        "qwen3_moe_ep8",
        "qwen3_next_80b_ep8",
        "tiny_mixtral",
        "tiny_mixtral_ep2",
        "tiny_mixtral_ep8",
        "tiny_olmoe_ep4",
    ]


# --set


def test_set_values_are_yaml_and_the_last_one_wins():
    config = load(
        "sampling.temperature=0.5",
        "sampling.temperature=1e-3",
        "sampling.stop=[END, 'a: b']",
        "sampling.ignore_eos=true",
        "moe.overlap.chunks=auto",
        "parallel.expert=null",
        "runtime.timeout_s=5",
    )
    assert config.sampling.temperature == 0.001
    assert config.sampling.stop == ("END", "a: b")
    assert config.sampling.ignore_eos is True
    assert config.moe.overlap.chunks == "auto"
    assert config.parallel.expert is None
    assert config.runtime.timeout_s == 5.0 and isinstance(config.runtime.timeout_s, float)


@pytest.mark.parametrize(
    ("override", "comment"),
    [
        ("sampling.stop=###", "###"),
        ("sampling.stop= # off", "# off"),
        ("sampling.stop=a #b", "#b"),
        ("sampling.stop=[a, b] # two", "# two"),
        ("sampling.stop='a' #", "#"),
        ("model.tokenizer=#dir", "#dir"),
        ("moe.capacity.factor=1.5 #x", "#x"),
    ],
)
def test_a_value_that_yaml_would_cut_at_a_comment_is_refused_with_how_to_quote_it(
    override, comment
):
    (problem,) = problems_of(override)
    assert f"--set {override}: {comment} is a comment in YAML and would be left out" in problem
    key, _, value = override.partition("=")
    assert problem.endswith(f"""quote the value: --set '{key}="{value.strip()}"'""")


def test_a_quoted_or_inner_number_sign_is_text():
    config = load("""sampling.stop=["###", 'a #b', c#d]""", "model.path=/a#b")
    assert config.sampling.stop == ("###", "a #b", "c#d")
    assert config.model.path == "/a#b"
    assert load('sampling.stop="###"').sampling.stop == ("###",)


def test_the_home_folder_is_expanded_in_paths_and_variables_are_not(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "model: {path: ~/m, tokenizer: ~/t}\nprofiler: {spans: ~/s, routing: ~/r}"
    config = load_config(write(text))
    assert (config.model.path, config.model.tokenizer) == ("/home/me/m", "/home/me/t")
    assert (config.profiler.spans, config.profiler.routing) == ("/home/me/s", "/home/me/r")
    config = load("model.path=~/a", "model.tokenizer=$HOME/t", "profiler.spans=~/b")
    assert (config.model.path, config.model.tokenizer) == ("/home/me/a", "$HOME/t")
    assert config.profiler.spans == "/home/me/b"
    assert load_config(write(to_yaml(config))) == config
    assert load("model.path=~nobody-here/x").model.path == "~nobody-here/x"


def test_claims_are_recorded_only_where_routing_is():
    (problem,) = problems_of("profiler.routing_claims=true")
    assert problem.startswith("profiler.routing_claims = True: needs the folder of a recording")
    assert load("profiler.routing_claims=true", "profiler.routing=r").profiler.routing_claims


def test_a_single_value_is_accepted_as_a_list_of_one():
    config = load("sampling.stop=END", "sampling.stop_token_ids=7", "moe.capacity.phases=decode")
    assert config.sampling.stop == ("END",)
    assert config.sampling.stop_token_ids == (7,)
    assert config.moe.capacity.phases == ("decode",)
    assert load("moe.capacity.phases=both").moe.capacity.phases == ("prefill", "decode")
    assert load("sampling.stop=both").sampling.stop == ("both",)


def test_set_may_add_a_section_that_the_file_left_out_or_empty(write):
    path = write("model: {path: x}\nmoe:\n")
    assert load_config(path, ["moe.capacity.seed=3"]).moe.capacity.seed == 3


@pytest.mark.parametrize("override", ["sampling.top_k", "=3", "sampling..top_k=3", "seed.=3"])
def test_a_malformed_set_is_refused_by_its_own_name(override):
    (problem,) = problems_of(override)
    assert problem == f"--set {override}: must be section.key=value"


def test_set_below_a_value_is_refused():
    (problem,) = problems_of("model.path.x=1")
    assert problem == "--set model.path.x=1: model.path holds no keys"


# The capacity factor is a decimal, not a binary fraction.


@pytest.mark.parametrize("written", ["1.1", "1.10", "2", "0.3333333333333333333333333", "1e-1"])
def test_the_capacity_factor_is_exactly_the_decimal_written(written):
    capacity = load(f"moe.capacity.factor={written}").moe.capacity
    assert capacity.exact_factor == Decimal(written)
    assert f"factor: {written}\n" in to_yaml(load(f"moe.capacity.factor={written}"))


@pytest.mark.parametrize("written", ["inf", ".inf", "'inf'"])
def test_an_infinite_capacity_factor_is_accepted(written):
    capacity = load(f"moe.capacity.factor={written}").moe.capacity
    assert capacity.factor == "inf" and capacity.exact_factor == Decimal("Infinity")


def test_a_factor_of_python_is_read_by_its_shortest_decimal():
    assert CapacityConfig(factor=1.1).exact_factor == Decimal("1.1")


@pytest.mark.parametrize("written", ["0", "-1", "nan", "-inf", "much", "true", "null", "[1.5]"])
def test_a_factor_that_is_no_positive_number_is_refused(written):
    (problem,) = problems_of(f"moe.capacity.factor={written}")
    assert problem.startswith("moe.capacity.factor = ")


# Errors name field, value, rule and the nearest key.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scheduler.max_bach_tokens=9", "did you mean scheduler.max_batch_tokens?"),
        (
            "schedular.max_batch_tokens=9",
            "schedular = {'max_batch_tokens': 9}: unknown key; did you mean scheduler?",
        ),
        (
            "moe.capacity.facter=2",
            "moe.capacity.facter = 2: unknown key; did you mean moe.capacity.fa",
        ),
        ("temperature=1", "temperature = 1: unknown key; did you mean sampling.temperature?"),
        ("moe.polici=none", "moe.polici = 'none': unknown key; did you mean moe.policy?"),
        ("parallel.qqqq=1", "parallel.qqqq = 1: unknown key; the keys here are expert, tensor"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_key(override, message):
    (problem,) = problems_of(override)
    assert message in problem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.dtype=float33",
            "must be one of auto, float32, bfloat16, float16; did you mean flo",
        ),
        ("moe.capacity.policy=tokendrop", "did you mean token_drop?"),
        ("moe.policy=token_drop", "the path of a policy file; did you mean moe.capacity.policy?"),
        ("moe.overlap.chunks=atuo", "must be a whole number or auto; did you mean auto?"),
        ("moe.overlap.chunks=0", "must be at least 1, or auto"),
        ("moe.overlap.by=token", "must be one of auto, experts, tokens; did you mean tokens?"),
        ("moe.dispatch.dtype=fp4", "must be one of auto, bf16, fp8"),
        ("sampling.max_new_tokens=1.5", "sampling.max_new_tokens = 1.5: must be a whole number"),
        ("sampling.max_new_tokens=true", "sampling.max_new_tokens = True: must be a whole number"),
        ("sampling.max_new_tokens=0", "sampling.max_new_tokens = 0: must be at least 1"),
        ("sampling.ignore_eos=yes", "sampling.ignore_eos = 'yes': must be true or false"),
        ("sampling.temperature=-0.1", "must be finite and at least 0"),
        ("sampling.temperature=inf", "must be finite and at least 0"),
        ("sampling.top_p=0", "sampling.top_p = 0.0: must be above 0 and at most 1"),
        ("sampling.top_p=1.01", "must be above 0 and at most 1"),
        ("sampling.stop=[a, '']", "must be free of empty text"),
        ("sampling.stop=[1]", "must be a list, each item text"),
        ("sampling.stop_token_ids=[-1]", "must be free of negative numbers"),
        ("moe.capacity.phases=[]", "must be a list of phases, not empty and without repeats"),
        ("moe.capacity.phases=[decode, decode]", "not empty and without repeats"),
        ("moe.capacity.phases=[train]", "each item one of prefill, decode"),
        ("moe.capacity.phases=[decode, prefil]", "prefill, decode; did you mean prefill?"),
        ("moe.capacity.factor=1e999999", "at most 100 digits on each side of the point"),
        ("moe.capacity.factor=1e-999999", "at most 100 digits on each side of the point"),
        ("moe.capacity.factor=-inf", "must be a number above 0, or inf"),
        ("moe.capacity.factor=sNaN", "must be a number above 0, or inf"),
        (f"moe.overlap.chunks={10**30}", "must be at least 1, or auto; at most 256"),
        (f"model.max_model_len={10**30}", "must be at least 1 and at most 2147483647"),
        (f"scheduler.max_batch_tokens={10**30}", "at least 1 and at most 2147483647"),
        (f"scheduler.max_sequences={10**30}", "at least 1 and at most 2147483647"),
        (f"scheduler.kv_cache_blocks={10**30}", "at least 1 and at most 2147483647"),
        ("scheduler.kv_cache_gib=1e300", "must be finite and above 0, at most 1048576"),
        ("scheduler.block_size=1099511627776", "must be a power of two, at most 2**20"),
        ("profiler.spans=''", "profiler.spans = '': must be non-empty text that can be a path"),
        ("profiler.routing=''", "profiler.routing = '': must be non-empty text that can be a path"),
        ("profiler.routing_mib=0", "profiler.routing_mib = 0.0: must be finite and above 0"),
        ('profiler.spans="a\\0b"', "must be non-empty text that can be a path"),
        ('profiler.spans="\\ud800"', "must be non-empty text that can be a path"),
        ("profiler.spans_mib=1e308", "must be finite and above 0, at most 1073741824"),
        ("profiler.metrics_host=http://x", "must be an address or a host name"),
        ("profiler.metrics_host=''", "must be an address or a host name"),
        ('profiler.metrics_host="a\\0b"', "must be an address or a host name"),
        ("profiler.metrics_port=65536", "must be a port, 0 to 65535"),
        ("profiler.metrics_port=-1", "must be a port, 0 to 65535"),
        ("runtime.threads=0", "must be at least 1 and at most 1024"),
        ("runtime.threads=-1", "must be at least 1 and at most 1024"),
        ("runtime.threads=1000000", "must be at least 1 and at most 1024"),
        ("runtime.timeout_s=-1", "must be finite and above 0: from 0.1 to 604800, a week"),
        ("runtime.timeout_s=1e-9", "must be finite and above 0: from 0.1 to 604800, a week"),
        ("runtime.timeout_s=1000000000000", "must be finite and above 0: from 0.1 to 604800"),
        ("runtime.timeout_s=inf", "must be finite and above 0: from 0.1 to 604800, a week"),
        ("runtime.timeout_s=nan", "runtime.timeout_s = 'nan': must be a number"),
        ("runtime.drain_s=1000000000000", "must be finite and at least 0, at most 604800"),
        ("scheduler.block_size=24", "scheduler.block_size = 24: must be a power of two"),
        ("scheduler.kv_cache_gib=0", "must be finite and above 0"),
        ("runtime.timeout_s=0", "must be finite and above 0"),
        ("runtime.seed=-1", "must be from 0 to 2**63 - 1"),
        ("model.path=''", "model.path = '': must be non-empty text"),
        ("model.path=null", "model.path = None: must be text"),
        ("parallel=2", "parallel = 2: must be a section of keys (expert, tensor)"),
        ("model=x", "model = 'x': must be a section of keys (path, tokenizer, "),
        ("model=[x]", "model = ['x']: must be a section of keys (path, tokenizer, "),
        (f"sampling.temperature={'1' * 400}", "= 11111111... (400 digits): must have at most 300"),
        (f"sampling.seed={'1' * 5000}", "sampling.seed = 11111111... (5000 digits): must have"),
        (f"sampling.stop_token_ids=[1, {'1' * 400}]", "stop_token_ids = 11111111... (400 digits)"),
        (f"x={'1' * 5000}", "... (5000 digits): unknown key"),
    ],
)
def test_a_wrong_value_is_refused_by_field_value_and_rule(override, message):
    (problem,) = problems_of(override)
    assert message in problem and problem.startswith(override.partition("=")[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 0, -1])
def test_absurd_numbers_of_python_are_refused_in_words(value):
    with pytest.raises(ConfigError) as caught:
        Config(
            model=ModelConfig(path="x"),
            scheduler=SchedulerConfig(kv_cache_gib=value),
            runtime=RuntimeConfig(timeout_s=value),
            profiler=ProfilerConfig(spans_mib=value),
        )
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
def test_a_temperature_that_no_float_holds_is_refused_in_words(value):
    with pytest.raises(ConfigError, match=r"sampling\.temperature = .*must be finite"):
        Config(model=ModelConfig(path="x"), sampling=SamplingConfig(temperature=value))


def test_all_problems_are_listed_at_once(write):
    with pytest.raises(ConfigError) as caught:
        load_config(
            write("sampling: {top_p: 2, top_q: 1}\nscheduler: {block_size: 3}"),
            ["runtime.device=gpu"],
        )
    text = str(caught.value)
    assert text.startswith("5 problems in the config:")
    for name in ("model.path: is missing", "top_p = 2.0", "top_q", "block_size = 3", "'gpu'"):
        assert name in text


def test_a_config_made_in_python_is_checked_like_a_file():
    with pytest.raises(ConfigError) as caught:
        Config(
            model=ModelConfig(path=3),  # type: ignore[arg-type]
            scheduler=SchedulerConfig(block_size=0),
            sampling=SamplingConfig(stop=["a"]),  # type: ignore[arg-type]
        )
    assert len(caught.value.problems) == 3


def test_a_config_error_survives_pickling_between_ranks():
    error = ConfigError("one", "two")
    copy = pickle.loads(pickle.dumps(error))
    assert copy.problems == ("one", "two") and str(copy) == str(error)


# Combinations


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.expert=4", "parallel.tensor=3"], "parallel.tensor = 3: must divide"),
        (["moe.capacity.policy=token_drop", "moe.capacity.expand=2"], "moe.capacity.expand = 2"),
        (["moe.capacity.expand=0"], "the policy is none"),
        (
            ["moe.capacity.policy=token_drop", "moe.capacity.tiers=one"],
            "moe.capacity.tiers = 'one'",
        ),
        (["moe.capacity.extras=dropped"], "only moe.capacity.policy = expanded_drop uses it"),
        (
            ["moe.capacity={policy: expanded_drop, tiers: one, order: first}"],
            "moe.capacity.order = 'first': must be score",
        ),
        (["scheduler.kv_cache_gib=1", "scheduler.kv_cache_blocks=9"], "must be null when"),
        (["moe.experts.backend=te", "runtime.device=cpu"], "needs runtime.device = cuda"),
        (["moe.experts.backend=scaled_mm", "runtime.device=cpu"], "needs runtime.device = cuda"),
        (["moe.experts.backend=deep_gemm", "runtime.device=cpu"], "needs runtime.device = cuda"),
        (["sampling.top_logprobs=3"], "top_logprobs = 3: needs sampling.logprobs = true"),
        (["sampling.prompt_top_logprobs=3"], "needs sampling.prompt_logprobs = true"),
        (["sampling.min_tokens=200"], "min_tokens = 200: must be at most"),
    ],
)
def test_an_impossible_combination_is_refused(overrides, message):
    (problem,) = problems_of(*overrides)
    assert message in problem


def test_expanded_drop_takes_all_its_settings():
    capacity = load(
        "moe.capacity={policy: expanded_drop, expand: 2, tiers: two, extras: dropped, factor: 1.5}"
    ).moe.capacity
    assert (capacity.expand, capacity.tiers, capacity.extras) == (2, "two", "dropped")


def test_extras_for_dropped_assignments_alone_need_two_tiers():
    with pytest.raises(ConfigError, match=r"moe\.capacity\.extras = 'dropped': must be all"):
        load("moe.capacity={policy: expanded_drop, tiers: one, extras: dropped}")


def test_a_token_cannot_add_more_experts_than_a_rank_has():
    capacity = CapacityConfig(policy="expanded_drop", expand=5)
    validate_capacity(capacity, num_experts=10, top_k=2, expert_ranks=2)
    with pytest.raises(
        ConfigError, match=r"moe\.capacity\.expand = 5: must be at most 4"
    ) as caught:
        validate_capacity(capacity, num_experts=10, top_k=2, expert_ranks=3)
    assert "10 experts on 3 ranks" in str(caught.value)


def test_expansion_needs_experts_outside_the_top_k():
    with pytest.raises(ConfigError, match="already chooses all 4 experts"):
        validate_capacity(
            CapacityConfig(policy="expanded_drop"), num_experts=4, top_k=4, expert_ranks=2
        )


def parallel_config(expert: Any, tensor: int) -> Config:
    return Config(
        model=ModelConfig(path="x"), parallel=ParallelConfig(expert=expert, tensor=tensor)
    )


@pytest.mark.parametrize(
    ("expert", "tensor", "world", "num_experts"),
    [(None, 1, 7, 8), (None, 2, 4, 4), (2, 1, 8, 8), (4, 4, 4, 60), (1, 1, 3, 1)],
)
def test_a_world_that_fits_raises_no_error(expert, tensor, world, num_experts):
    validate_world(parallel_config(expert, tensor), world, num_experts)


@pytest.mark.parametrize(
    ("expert", "tensor", "world", "num_experts", "message"),
    [
        (8, 1, 1, 8, "parallel.expert = 8: must divide the number of ranks, 1"),
        (3, 1, 8, None, "must divide the number of ranks, 8"),
        (None, 2, 3, None, "parallel.tensor = 2: must divide the expert-parallel size, 3"),
        (None, 1, 16, 8, "parallel.expert = null (all ranks): must be at most"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(expert, tensor, world, num_experts, message):
    with pytest.raises(ConfigError, match="parallel") as caught:
        validate_world(parallel_config(expert, tensor), world, num_experts)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("world", "num_experts", "tensor", "size"),
    [(8, 8, 1, 8), (7, 8, 1, 7), (12, 8, 1, 6), (11, 8, 1, 1), (16, 60, 4, 16), (12, 8, 4, 4)],
)
def test_an_automatic_expert_size_is_the_largest_that_divides_the_ranks(
    world, num_experts, tensor, size
):
    config = parallel_config("auto", tensor)
    assert expert_ranks(config.parallel, world, num_experts) == size
    validate_world(config, world, num_experts)


def test_an_automatic_expert_size_needs_whole_tensor_groups():
    with pytest.raises(ConfigError, match="start a multiple of 2 ranks"):
        expert_ranks(parallel_config("auto", 2).parallel, 3, 8)


def test_a_fixed_expert_size_that_does_not_fit_names_the_automatic_one():
    with pytest.raises(ConfigError, match="parallel.expert=auto"):
        validate_world(parallel_config(8, 1), 7)


# Files


def test_a_config_is_found_by_path_then_by_name_with_or_without_suffix(
    tmp_path, monkeypatch, write
):
    monkeypatch.chdir(tmp_path)
    own = Path(write("model: {path: x}"))
    assert find_config("a.yaml") == find_config("a") == Path("a.yaml")
    assert find_config(str(own)) == own
    shipped = PROJECT_ROOT / "configs" / "mixtral_ep8.yaml"
    assert find_config("mixtral_ep8") == find_config("mixtral_ep8.yaml") == shipped
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mixtral_ep8.yaml").write_text("model: {path: mine}")
    assert load_config("mixtral_ep8").model.path == "mine"


def test_a_config_that_is_not_there_is_refused_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="mixtral_ep4.*did you mean mixtral_ep8"):
        load_config("mixtral_ep4.yaml")
    with pytest.raises(ConfigError, match="there are: deepseek_v2_lite_ep8, deepseek_v3_ep8, "):
        load_config("/no/where")


def test_a_relative_model_path_is_looked_up_here_then_in_the_project(tmp_path, monkeypatch, write):
    path = write("model: {path: configs, tokenizer: nowhere}")
    assert load_config(path).model.path in ("configs", str(PROJECT_ROOT / "configs"))
    monkeypatch.chdir(tmp_path)
    assert load_config(path).model.path == str(PROJECT_ROOT / "configs")
    assert load_config(path).model.tokenizer == "nowhere"
    (tmp_path / "configs").mkdir()
    assert load_config(path).model.path == "configs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: x}\nmodel: {path: y}", "the key 'model' is given twice"),
        ("model: [", "is not valid YAML"),
        ("- a", "must hold sections of keys"),
        ("", "must hold sections of keys"),
        ("model: !!python/object/apply:os.system [exit]", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(write, text, message):
    with pytest.raises(ConfigError, match="a.yaml") as caught:
        load_config(write(text))
    assert message in str(caught.value)


def test_a_model_that_is_no_section_is_refused_by_field_and_value(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("model: some/path"))
    assert str(caught.value).startswith("model = 'some/path': must be a section of keys (path, ")


def test_a_file_that_is_not_utf_8_is_refused_by_its_name(write):
    path = write("")
    Path(path).write_bytes(b"model: {path: caf\xe9}")
    with pytest.raises(ConfigError, match=r"a\.yaml: is not UTF-8 \(byte 17 .*; save it as UTF-8"):
        load_config(path)


def test_a_file_that_cannot_be_read_is_refused_by_its_name(write, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied")

    path = write("model: {path: x}")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"a\.yaml: cannot be read: Permission denied; "):
        load_config(path)


@pytest.mark.parametrize("value", ["!!int abc", "!!bool maybe", "!!timestamp x", "[" * 5000])
def test_a_value_that_yaml_itself_cannot_make_is_refused_by_its_field(value):
    (problem,) = problems_of(f"sampling.seed={value}")
    assert problem.startswith("--set sampling.seed=") and "is not valid YAML" in problem


def test_a_model_path_that_the_file_system_refuses_is_kept_as_written():
    assert load(f"model.path={'x' * 5000}").model.path == "x" * 5000


def test_words_of_old_yaml_stay_words(write):
    config = load_config(write("model: {path: on}\nsampling: {stop: [no, y, 1:30, 2024-01-01]}"))
    assert config.model.path == "on"
    assert config.sampling.stop == ("no", "y", "1:30", "2024-01-01")


# Back to YAML

texts = st.text(st.characters(codec="utf-8"), min_size=1)


@given(
    path=texts,
    stop=st.lists(texts),
    temperature=st.floats(min_value=0, allow_infinity=False),
    factor=st.decimals(min_value=Decimal(1), max_value=Decimal(10**9), allow_nan=False),
    expert=st.none() | st.integers(1, 99),
)
def test_yaml_of_a_config_reads_back_equal(path, stop, temperature, factor, expert):
    config = Config(
        model=ModelConfig(path=path),
        sampling=SamplingConfig(stop=tuple(stop), temperature=temperature),
        moe=MoEConfig(capacity=CapacityConfig(factor=str(factor))),
        parallel=ParallelConfig(expert=expert),
    )
    text = to_yaml(config)
    again = config_from_tree(yaml.load(text, Loader=config_io._Loader))
    # A path that happens to exist below the project root comes back from there.
    again = dataclasses.replace(again, model=config.model)
    assert again.moe.capacity.exact_factor == config.moe.capacity.exact_factor
    assert dataclasses.replace(again, moe=config.moe) == config


def test_the_saved_config_of_a_run_loads_to_the_same_config(write):
    config = load("moe.capacity.factor=1.10", "sampling.stop=['1e-3', 'true', 'null', '~', '1']")
    again = load_config(write(to_yaml(config)))
    assert again == config and digest(again) == digest(config)


def test_the_digest_distinguishes_settings_and_nothing_else(write):
    spelled = load_config(write("model: {path: x}\nruntime: {timeout_s: 120}"))
    assert digest(spelled) == digest(load_config(write("# x\nmodel:\n    path: 'x'\n")))
    assert digest(spelled) != digest(load_config(write("model: {path: y}")))
    assert len(digest(spelled)) == 64


def test_a_balanced_shared_expert_needs_partial_sums_and_ranks_that_know_all_rows():
    (problem,) = problems_of("moe.shared_expert=balanced")
    assert problem.startswith("moe.shared_expert = 'balanced': ")
    assert problem.endswith("needs moe.dispatch.partial_sums = true")
    sums = "moe.dispatch.partial_sums=true"
    expanded = ("moe.capacity.policy=expanded_drop", "moe.capacity.factor=1")
    (problem,) = problems_of("moe.shared_expert=balanced", sums, *expanded)
    assert problem.startswith("moe.shared_expert = 'balanced': moe.capacity.policy")
    assert load("moe.shared_expert=balanced", sums).moe.shared_expert == "balanced"
    assert load().moe.shared_expert == "replicated"


def test_partial_sums_need_deduplicated_rows():
    (problem,) = problems_of("moe.dispatch.partial_sums=true", "moe.dispatch.deduplicate=false")
    assert problem.startswith("moe.dispatch.partial_sums = True: ")
    assert "needs moe.dispatch.deduplicate = true" in problem
    assert load("moe.dispatch.partial_sums=true").moe.dispatch.deduplicate


def test_two_batch_overlap_and_capacity_exclude_each_other():
    (problem,) = problems_of("moe.overlap.two_batch=true", "moe.capacity.policy=token_drop")
    assert problem.startswith("moe.overlap.two_batch = True: ")
    assert "moe.capacity.policy is token_drop" in problem
    assert load("moe.overlap.two_batch=true").moe.overlap.two_batch


def test_deepspeeds_comms_logger_needs_the_profiler():
    (problem,) = problems_of("profiler.deepspeed_comms=true", "profiler.enabled=false")
    assert problem.startswith("profiler.deepspeed_comms = True: needs what the profiler measures")
    assert load("profiler.deepspeed_comms=true").profiler.deepspeed_comms
