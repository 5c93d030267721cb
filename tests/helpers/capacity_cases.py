"""Random routing for the capacity tests, and the engine and the reference run on it.

A case is drawn by hypothesis as a `Case`; `run_engine` decides it on threads as ranks, `expected`
with the slow reference.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from hypothesis import strategies as st

from engine.config import CapacityConfig
from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.capacity.decision import Decision
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.router import RouterSpec, Routing, route
from engine.moe.step import MoEStep
from tests.helpers import reference
from tests.helpers.bounds import bounds
from tests.helpers.threads import run_threads


@dataclass(frozen=True)
class Case:
    """tokens: of each rank. levels: how many different logits there are (few make ties, 0 means
    all equal). skew: how much better lower experts look. passing: share of tokens outside the
    phases. rules: settings of moe.capacity.
    """

    tokens: tuple[int, ...]
    num_experts: int
    top_k: int
    rules: dict = field(default_factory=dict)
    selection: str = "auto"
    levels: int = 5
    skew: float = 1.0
    passing: float = 0.0
    normalize: bool = False
    scale: float = 1.0
    score: str = "softmax"
    seed: int = 0
    zero_experts: int = 0

    @property
    def spec(self) -> RouterSpec:
        """The router."""
        return RouterSpec(
            num_experts=self.num_experts,
            num_zero_experts=self.zero_experts,
            top_k=self.top_k,
            normalize=self.normalize,
            scale=self.scale,
            score=self.score,  # pyright: ignore[reportArgumentType]
        )

    @property
    def bounds(self) -> list[int]:
        """First expert of every rank, and the end."""
        return bounds(self.num_experts, len(self.tokens))

    @property
    def capacity_rules(self) -> reference.Rules:
        """The settings as the reference takes them."""
        return reference.Rules(**self.rules)


@dataclass
class Tokens:
    """All tokens of a case in one pool: who holds them is `owner`. chosen: the routing with zero
    experts as experts of their own.
    """

    routing: Routing
    chosen: Routing
    request: np.ndarray
    position: np.ndarray
    competes: np.ndarray
    owner: np.ndarray


def make_tokens(case: Case) -> Tokens:
    """Draw the case's tokens, the same whatever the number of ranks that hold them."""
    total, random = sum(case.tokens), np.random.default_rng(case.seed)
    num_logits = case.spec.num_logits
    logits = random.integers(0, max(case.levels, 1), (total, num_logits)).astype(np.float32)
    logits += case.skew * np.linspace(2.0, 0.0, num_logits, dtype=np.float32)
    if case.levels == 0:
        logits[:] = 0.25
    routing = chosen = route(torch.from_numpy(logits), case.spec)
    if case.zero_experts:
        plain = replace(case.spec, num_experts=num_logits, num_zero_experts=0)
        chosen = route(torch.from_numpy(logits), plain)
    numbers = random.permutation(4 * total)[:total]
    competes = random.random(total) >= case.passing
    owner = np.repeat(np.arange(len(case.tokens)), case.tokens)
    return Tokens(routing, chosen, numbers % 3, numbers // 3, competes, owner)


def run_engine(
    case: Case, tokens: Tokens | None = None, layout: ExpertLayout | None = None
) -> list[Decision]:
    """The engine's decision on every rank. layout: of the dispatch; by default in chunks."""
    tokens = tokens or make_tokens(case)
    world = len(case.tokens)
    rules = asdict(case.capacity_rules)
    del rules["layer"], rules["shares"]
    config = CapacityConfig(**rules, selection=case.selection)
    logs: dict[int, list] = {}

    def decide(collectives) -> Decision | None:
        rank = collectives.rank
        agreement = CapacityAgreement(
            case.spec,
            config,
            layer=case.capacity_rules.layer,
            layout=layout or ExpertLayout(case.bounds, 1 + case.seed % 3),
            collectives=collectives,
        )
        mine = torch.from_numpy(tokens.owner == rank)
        routing = Routing(
            tokens.routing.scores_TE[mine],
            tokens.routing.topk_ids_TK[mine],
            tokens.routing.topk_weights_TK[mine],
        )
        competes = torch.from_numpy(tokens.competes)[mine]
        step = MoEStep(
            request_T=torch.from_numpy(tokens.request)[mine].int(),
            position_T=torch.from_numpy(tokens.position)[mine].int(),
            eligible_T=None if tokens.competes.all() else competes,
            num_own_eligible=int(competes.sum()),
            num_tokens_W=tuple(int((tokens.owner == other).sum()) for other in range(world)),
            num_eligible=int(tokens.competes.sum()),
            weights_W=case.capacity_rules.shares,
        )
        decision = agreement.decide(routing, step) if agreement.applies(step) else None
        logs[rank] = collectives.log
        return decision

    decisions = run_threads(decide, world)
    assert all(log == logs[0] for log in logs.values()), "ranks called different collectives"
    return decisions


def expected(case: Case, tokens: Tokens | None = None) -> reference.Outcome:
    """Return the outcome of the reference."""
    tokens = tokens or make_tokens(case)
    routing = tokens.chosen
    inputs = []
    for rank in range(len(case.tokens)):
        mine = tokens.owner == rank
        inputs.append(
            reference.RankInput(
                scores=routing.scores_TE.numpy()[mine],
                topk_ids=routing.topk_ids_TK.numpy()[mine],
                weights=routing.topk_weights_TK.numpy()[mine],
                request=tokens.request[mine],
                position=tokens.position[mine],
                competes=tokens.competes[mine],
            )
        )
    family = reference.Family(
        normalize=case.normalize, scale=case.scale, zero_experts=case.zero_experts
    )
    return reference.decide(
        inputs, case.capacity_rules, family, case.bounds, case.num_experts, case.top_k
    )


GAMMAS = ("0.25", "0.5", "0.9", "1", "1.1", "1.5", "2", "3")


@st.composite
def cases(draw: st.DrawFn, **fixed) -> Case:
    """Any case; `fixed` pins rules."""
    world = draw(st.integers(1, 8))
    num_experts = draw(st.integers(max(2, world), 12))
    top_k = draw(st.integers(1, min(4, num_experts - 1)))
    policy = fixed.get("policy") or draw(st.sampled_from(["token_drop", "expanded_drop"]))
    tiers = fixed.get("tiers") or draw(st.sampled_from(["two", "two", "one"]))
    rules = {
        "policy": policy,
        "factor": draw(st.sampled_from(GAMMAS)),
        "scope": draw(st.sampled_from(["expert", "rank"])),
        "consensus": draw(st.sampled_from(["global", "global", "quota", "local"])),
        "order": draw(st.sampled_from(["score", "first", "last", "random"])),
        "renormalize": draw(st.booleans()),
        "seed": draw(st.sampled_from([0, 7, 2**63 - 1])),
        "layer": draw(st.integers(0, 3)),
    }
    if policy == "expanded_drop":
        rules["tiers"] = tiers
        rules["expand"] = draw(st.sampled_from([None, 0, 1, 2]))
        rules["extras"] = "all" if tiers == "one" else draw(st.sampled_from(["all", "dropped"]))
        if tiers == "one":
            rules["order"] = "score"
    if fixed.get("shares") == "drawn":
        unit = st.integers(256, 2048)
        fixed["shares"] = tuple(draw(st.lists(unit, min_size=world, max_size=world)))
    zero_experts = fixed.pop("zero_experts", 0)
    if zero_experts == "drawn":
        zero_experts = draw(st.integers(1, 6))
    rules |= fixed
    normalizes = st.just(False) if zero_experts and policy == "expanded_drop" else st.booleans()
    return Case(
        tokens=tuple(draw(st.lists(st.integers(0, 14), min_size=world, max_size=world))),
        num_experts=num_experts,
        top_k=top_k,
        rules=rules,
        selection=draw(st.sampled_from(["auto", "gather", "radix"])),
        levels=draw(st.sampled_from([0, 1, 2, 5, 1000])),
        skew=draw(st.sampled_from([0.0, 1.0, 3.0])),
        passing=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        normalize=draw(normalizes),
        scale=draw(st.sampled_from([1.0, 2.5])),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        seed=draw(st.integers(0, 2**20)),
        zero_experts=zero_experts,
    )
