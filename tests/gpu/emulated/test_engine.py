"""The real engine on emulated CUDA: the CPU's completions, and nothing that CUDA would refuse.

Run: pytest tests/gpu/emulated/test_engine.py
"""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import CapacityConfig
from engine.layers.parallel import TensorSum
from engine.models.decoder import CausalLM
from engine.moe.capacity.consensus_global import GatherConsensus, RadixConsensus
from engine.moe.capacity.consensus_quota import QuotaConsensus
from engine.moe.capacity.copies_agreement import CopiesAgreement
from engine.moe.dispatch.dedup import Deduplicator
from engine.moe.dispatch.row_format import RowFormat
from engine.moe.dispatch.shared_rows import SharedRows
from engine.moe.dispatch.static_exchange import StaticExchange
from engine.moe.experts import GroupedMMExperts
from engine.moe.local_experts import LocalExperts
from engine.moe.placement.row_split import RowSplit
from engine.moe.policy.policy import Policy
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import SCATTERED, Job, Placed

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

GATHER, RADIX = ((GatherConsensus, "begin"),), ((RadixConsensus, "begin"),)
DEDUPLICATED, PACKED = ((Deduplicator, "unique"),), ((RowFormat, "encode"),)
TENSOR_SUM, TWO_BATCH = ((TensorSum, "__call__"),), ((CausalLM, "forward_two_batch"),)

MOVED, CLAIMS = ((RowSplit, "instances_of"),), ((CopiesAgreement, "_counts"),)
LOW_BIT = (*CLAIMS, (LocalExperts, "_run_copies"))
COPIED = (0, 2, 5)  # experts that both ranks have
ALL = tuple(range(8))
BY_TRANSFORMERS = {"model": {"implementation": "transformers"}}
PLAIN = {"dispatch": {"deduplicate": False}}
GROUPED, GROUPED_MM = {"model": {"dtype": "bfloat16"}}, {"backend": "grouped_mm"}
STATIC = ((GroupedMMExperts, "_run_to"), (StaticExchange, "__call__"))


# Two prefixes of four blocks, each with 3, 7, 0 and 1 tokens behind it.
SHARED = [[*range(first, first + 16), *range(own)] for own in (3, 7, 0, 1) for first in (20, 60)]


def moe(**sections: Any) -> dict[str, Any]:
    return {"moe": sections}


def drop(policy: str, selection: str, **capacity: Any) -> dict[str, Any]:
    chosen = {"policy": policy, "factor": "1", "selection": selection, **capacity}
    return moe(capacity=chosen)


JOBS = {
    "mixtral": Job("mixtral"),
    "qwen3 dedup chunks": Job("qwen3_moe", moe(overlap={"chunks": 2}), uses=DEDUPLICATED),
    "olmoe chunks by tokens": Job("olmoe", moe(overlap={"chunks": 3, "by": "tokens"})),
    "qwen2 chunks auto": Job("qwen2_moe", moe(overlap={"chunks": "auto"})),
    "deepseek-v2 tensor": Job("deepseek_v2", {"parallel": {"tensor": 2}}, uses=TENSOR_SUM),
    "deepseek-v3": Job("deepseek_v3"),
    "glm4": Job("glm4_moe"),
    "minimax-m2": Job("minimax_m2"),
    "ernie": Job("ernie4_5_moe"),
    "gpt-oss": Job("gpt_oss"),
    "llama4": Job("llama4_text"),
    "llama4 token_drop": Job("llama4_text", drop("token_drop", "gather"), uses=GATHER),
    "gpt-oss token_drop": Job("gpt_oss", drop("token_drop", "gather"), uses=GATHER),
    "qwen3-next": Job("qwen3_next"),
    "qwen3-next tensor": Job("qwen3_next", {"parallel": {"tensor": 2}}, uses=TENSOR_SUM),
    "qwen3-next preemption": Job(
        "qwen3_next", {"scheduler": {"kv_cache_blocks": 13}}, sampling={"max_new_tokens": 20}
    ),
    "qwen3.5 two_batch": Job("qwen3_5_moe_text", moe(overlap={"two_batch": True}), uses=TWO_BATCH),
    "qwen3.5 token_drop": Job("qwen3_5_moe_text", drop("token_drop", "gather"), uses=GATHER),
    "longcat": Job("longcat_flash"),
    "longcat token_drop": Job("longcat_flash", drop("token_drop", "gather"), uses=GATHER),
    "token_drop gather": Job("mixtral", drop("token_drop", "gather"), uses=GATHER),
    "token_drop radix": Job("mixtral", drop("token_drop", "radix"), uses=RADIX),
    "expanded_drop gather": Job("olmoe", drop("expanded_drop", "gather"), uses=GATHER),
    "expanded_drop radix": Job("olmoe", drop("expanded_drop", "radix", scope="rank"), uses=RADIX),
    "quota": Job(
        "olmoe", drop("token_drop", "auto", consensus="quota"), uses=((QuotaConsensus, "begin"),)
    ),
    "two_batch": Job("olmoe", moe(overlap={"two_batch": True}), uses=TWO_BATCH),
    "fp8 rows": Job("olmoe", moe(dispatch={"dtype": "fp8", "deduplicate": False}), uses=PACKED),
    "partial sums": Job("qwen3_moe", moe(dispatch={"partial_sums": True}), uses=DEDUPLICATED),
    "balanced shared expert": Job(
        "qwen2_moe",
        moe(dispatch={"partial_sums": True}, shared_expert="balanced"),
        uses=((SharedRows, "plan"), (SharedRows, "moves")),
    ),
    "bfloat16 grouped_mm": Job(
        "qwen3_moe",
        {"model": {"dtype": "bfloat16"}, **moe(experts={"backend": "grouped_mm"})},
        uses=((GroupedMMExperts, "_run"),),
    ),
    "static": Job(
        "mixtral", GROUPED | moe(experts=GROUPED_MM, dispatch={"exchange": "static"}), uses=STATIC
    ),
    "static sums": Job(
        "deepseek_v2",
        GROUPED
        | moe(experts=GROUPED_MM, dispatch={"exchange": "static", "partial_sums": True})
        | {"parallel": {"tensor": 2}},
    ),
    "static copies": Job(
        "qwen3_moe",
        GROUPED | moe(experts=GROUPED_MM, dispatch={"exchange": "static"}),
        uses=STATIC,
        placement=Placed(SCATTERED, COPIED),
    ),
    "homes anywhere": Job("qwen3_moe", placement=Placed(SCATTERED)),
    "copies": Job("mixtral", moe(**PLAIN), uses=MOVED, placement=Placed(SCATTERED, COPIED)),
    "copies dedup": Job("qwen3_moe", uses=MOVED + DEDUPLICATED, placement=Placed(copied=COPIED)),
    "copies chunks": Job(
        "olmoe",
        moe(overlap={"chunks": 2, "by": "experts"}, **PLAIN),
        uses=MOVED,
        placement=Placed(SCATTERED, COPIED),
    ),
    "copies chunks by tokens": Job(
        "olmoe",
        moe(overlap={"chunks": 2, "by": "tokens"}),
        uses=MOVED,
        placement=Placed(SCATTERED, COPIED),
    ),
    "copies two_batch": Job(
        "olmoe",
        moe(overlap={"two_batch": True}),
        uses=MOVED + TWO_BATCH,
        placement=Placed(SCATTERED, COPIED),
    ),
    "int4 copies": Job(
        "mixtral",
        moe(copies={"target": 1.0}),
        uses=LOW_BIT,
        placement=Placed(SCATTERED, ALL, precision="int4"),
    ),
    "bfloat16 int8 copies": Job(
        "mixtral",
        {
            "model": {"dtype": "bfloat16"},
            **moe(experts={"backend": "grouped_mm"}, copies={"target": 1.0}),
        },
        uses=LOW_BIT,
        placement=Placed(SCATTERED, ALL, precision="int8"),
    ),
    "token_drop copies": Job(
        "mixtral",
        drop("token_drop", "auto", scope="rank"),
        uses=CLAIMS,
        placement=Placed(SCATTERED, COPIED),
    ),
    "token_drop scope expert int4 copies": Job(
        "olmoe",
        drop("token_drop", "auto", order="last"),
        uses=CLAIMS,
        placement=Placed(copied=COPIED, precision="int4"),
    ),
    "expanded_drop copies": Job(
        "olmoe",
        drop("expanded_drop", "auto", scope="rank"),
        uses=CLAIMS,
        placement=Placed(SCATTERED, COPIED),
    ),
    "mixtral by transformers": Job("mixtral", BY_TRANSFORMERS),
    "granite by transformers": Job("granitemoe"),
    "exaone by transformers token_drop": Job(
        "exaone-moe", drop("token_drop", "gather"), uses=GATHER
    ),
    "mistral4 by transformers": Job("mistral4"),
    "copies by transformers": Job(
        "mixtral", {**BY_TRANSFORMERS, **moe(**PLAIN)}, uses=MOVED, placement=Placed(copied=COPIED)
    ),
    "sampling": Job("mixtral", sampling={"temperature": 0.9, "top_p": 0.8, "top_k": 20}),
    "prompt logprobs": Job("mixtral", sampling={"prompt_logprobs": True}),
    "shared prefixes": Job("qwen3_moe", prompts=SHARED),
    "shared prefixes latent": Job("deepseek_v2", {"parallel": {"tensor": 2}}, prompts=SHARED),
    "shared prefixes two_batch": Job(
        "olmoe", moe(overlap={"two_batch": True}), uses=TWO_BATCH, prompts=SHARED
    ),
    "shared prefixes capacity": Job("mixtral", drop("token_drop", "gather"), prompts=SHARED),
    "preemption": Job(
        "mixtral", {"scheduler": {"kv_cache_blocks": 13}}, sampling={"max_new_tokens": 20}
    ),
}


# What combines two features that other jobs have alone, and families whose layers others have, run
# in `make test-long`.
LONG = {
    "balanced shared expert",
    "bfloat16 grouped_mm",
    "bfloat16 int8 copies",
    "copies",
    "copies by transformers",
    "copies chunks",
    "copies chunks by tokens",
    "copies dedup",
    "copies two_batch",
    "deepseek-v2 tensor",
    "ernie",
    "exaone by transformers token_drop",
    "expanded_drop copies",
    "expanded_drop radix",
    "fp8 rows",
    "glm4",
    "gpt-oss token_drop",
    "homes anywhere",
    "llama4",
    "llama4 token_drop",
    "longcat",
    "longcat token_drop",
    "minimax-m2",
    "mistral4 by transformers",
    "mixtral by transformers",
    "olmoe chunks by tokens",
    "partial sums",
    "prompt logprobs",
    "quota",
    "qwen2 chunks auto",
    "qwen3 dedup chunks",
    "qwen3-next preemption",
    "qwen3-next tensor",
    "qwen3.5 token_drop",
    "qwen3.5 two_batch",
    "shared prefixes",
    "shared prefixes capacity",
    "shared prefixes latent",
    "shared prefixes two_batch",
    "static copies",
    "static sums",
    "token_drop copies",
    "token_drop radix",
    "token_drop scope expert int4 copies",
}
assert LONG <= JOBS.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in JOBS]
)
def test_completions_equal_the_cpus_to_the_bit(name: str, on_both_devices) -> None:
    job = JOBS[name]
    results, settings = on_both_devices(job), job.settings.get("moe", {})
    for cpu, cuda in results:
        assert cuda.dispatched == cpu.dispatched > 0
        assert "chunks" not in settings.get("overlap", {}) or cuda.chunks > 1
        uses = [record["capacity"] for record in cuda.done]
        assert any(use["dropped"] for use in uses) == ("capacity" in settings)
        cached = sum(record["usage"].get("cached_tokens", 0) for record in cuda.done)
        assert cached >= 64 or job.prompts is not SHARED
        assert any(use["added"] for use in uses) == name.startswith("expanded_drop")
    assert any(cuda.preemptions for _, cuda in results) == name.endswith("preemption")


@pytest.mark.long
def test_equal_layers_of_a_policy_cost_what_the_global_setting_costs(on_both_devices) -> None:
    capacity = CapacityConfig(policy="token_drop", factor="1", selection="gather")
    globally = on_both_devices(Job("mixtral", drop("token_drop", "gather"), uses=GATHER))
    policy = Policy({0: capacity, 1: capacity})
    by_policy = on_both_devices(Job("mixtral", policy=policy, uses=GATHER))
    assert by_policy == globally  # completions, drops, kernels, collectives and syncs


@pytest.mark.long
def test_layers_of_a_policy_that_differ_equal_the_cpus_to_the_bit(on_both_devices) -> None:
    both = CapacityConfig(policy="token_drop", factor="1", phases=("prefill", "decode"))
    for policy in (
        Policy({0: both, 1: CapacityConfig(policy="token_drop", factor="0.7", scope="rank")}),
        Policy({0: both}),
    ):
        for _, cuda in on_both_devices(Job("mixtral", policy=policy, uses=GATHER)):
            assert any(record["capacity"]["dropped"] for record in cuda.done)


@pytest.mark.long
def test_two_replicas_of_two_expert_parallel_ranks(on_both_devices) -> None:
    on_both_devices(Job("mixtral", {"parallel": {"expert": 2}}), world=4)


@pytest.mark.long
def test_no_setting_of_sampling_adds_a_sync(on_both_devices) -> None:
    every = {
        "temperature": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {3: 2.0, 4: -100.0},
        "stop_token_ids": (7, 8),
        "min_tokens": 8,
        "top_logprobs": 3,
    }
    plain = on_both_devices(Job("mixtral", sampling={"temperature": 0.8}))
    asked = on_both_devices(Job("mixtral", sampling=every))
    for (_, one), (_, other) in zip(plain, asked, strict=True):
        assert sum(one.syncs.values()) == sum(other.syncs.values()) > 0


def test_choices_and_likeliest_tokens_of_prompts_are_the_cpus(on_both_devices) -> None:
    sampling = {"temperature": 0.8, "n": 2, "prompt_logprobs": 2, "frequency_penalty": 1.0}
    for _, cuda in on_both_devices(Job("mixtral", sampling=sampling)):
        assert all(len(record["choices"]) == 2 for record in cuda.done)
