"""Predict: a scenario's layers and steps, by the engine's decisions and a cost model.

Legend: S steps, L MoE layers, E experts, W ranks of one replica.
"""

from __future__ import annotations

import zlib
from functools import cached_property

import numpy as np

from engine.moe.placement.instances import Instances
from engine.moe.placement.row_split import SplitRule
from engine.profiling.routing.trace import StepClaims
from engine.simulate.claims import counts_of, decide_claims, rank_of_tokens
from engine.simulate.cost_model import CostModel
from engine.simulate.decisions import Decided, LayerRules, StepCounts
from engine.simulate.exchanges import Exchanged, LayerExchanges
from engine.simulate.loads import Traffic, even, over_ranks, over_replicas
from engine.simulate.memory import rank_bytes
from engine.simulate.placements import Placements
from engine.simulate.prediction import LayerPrediction, Prediction
from engine.simulate.scenario import Scenario
from engine.simulate.shape import Shape
from engine.simulate.timeline import layer_time


class Simulator:
    """Predicts scenarios of one traffic.

    Args:
        traffic: the recorded or made steps.
        placements: of the scenarios.
        shape: of the model; None: unknown, no bytes and no memory.
        costs: None: rows and drops only.
        target: moe.copies.target.
        min_rows: moe.copies.min_rows.
        seed: of what is drawn.
    """

    def __init__(
        self,
        traffic: Traffic,
        placements: Placements,
        *,
        shape: Shape | None,
        costs: CostModel | None,
        target: float = 0.95,
        min_rows: int = 0,
        seed: int = 0,
    ) -> None:
        self._traffic, self._placements = traffic, placements
        self._shape, self._costs, self._seed = shape, costs, seed
        self._target, self._min_rows = target, min_rows

    @cached_property
    def _claims(self) -> dict[tuple[int, ...], StepClaims]:
        """The recorded claims by segment, step and first rank."""
        trace = self._traffic.trace
        if trace is None:
            return {}
        return {(each.segment, each.step, each.first_rank): each for each in trace.claims()}

    def predict(self, scenario: Scenario) -> Prediction:
        """Return what is predicted of a scenario.

        Raises:
            ValueError: a placement file is for another number of ranks.
        """
        traffic = self._traffic.scaled(scenario.tokens)
        file = self._placements.file
        precision = scenario.precision if file is None else file.precision
        layers, instances, is_exact = [], [], True
        num_steps, replicas = len(traffic.loads_SLE), scenario.replicas
        seconds_RS = np.zeros((replicas, num_steps))
        waiting = consensus = 0.0
        for place, layer in enumerate(traffic.layers):
            placed = Instances(self._placements.layer(scenario, place), scenario.expert_ranks)
            instances.append(placed)
            rules = LayerRules(
                scenario.capacity,
                placed,
                SplitRule(
                    low_bit=precision != "model" and placed.has_copies,
                    target=self._target,
                    min_rows=self._min_rows,
                    speeds_W=None if file is None else file.speeds_W,
                ),
                layer=layer,
                top_k=traffic.top_k,
                num_zero_experts=0 if self._shape is None else self._shape.num_zero_experts,
            )
            made = _Layer(self, scenario, traffic, rules, place)
            layers.append(made.predict(seconds_RS))
            is_exact &= made.is_exact
            waiting += made.waiting
            consensus += made.consensus / len(traffic.layers)
        memory = None
        if self._shape is not None:
            most = -(-int(traffic.tokens_S2.sum(1).max()) // scenario.ranks)
            memory = rank_bytes(scenario, self._shape, instances, most)
        step = share = None
        if self._costs is not None:
            total = float(seconds_RS.mean())
            share = waiting / total if total else 0.0
            tokens = float(traffic.tokens_S2.sum(1).mean()) / scenario.ranks
            line = self._costs.step
            step = float(seconds_RS.max(0).mean()) + line.fixed + line.per_token * tokens
        return Prediction(
            scenario=scenario,
            layers=layers,
            is_exact=is_exact,
            tokens=float(traffic.tokens_S2.sum(1).mean()),
            consensus_bytes=consensus,
            memory_bytes=memory,
            step_seconds=step,
            waiting=share,
        )


class _Layer:
    """One layer of one scenario."""

    def __init__(
        self,
        simulator: Simulator,
        scenario: Scenario,
        traffic: Traffic,
        rules: LayerRules,
        place: int,
    ) -> None:
        self._simulator, self._scenario, self._traffic = simulator, scenario, traffic
        self._rules, self._place = rules, place
        shape = simulator._shape
        self._exchanges = None
        if shape is not None:
            self._exchanges = LayerExchanges(
                rules, shape.hidden, shape.activation_bytes, scenario.ranks_per_node
            )
        self.is_exact, self.waiting, self.consensus = True, 0.0, 0.0

    def predict(self, seconds_RS: np.ndarray) -> LayerPrediction:
        """Return the layer's prediction; add its seconds to those of each replica and step."""
        scenario, traffic = self._scenario, self._traffic
        replicas, num_steps = scenario.replicas, len(traffic.loads_SLE)
        rows_SW = np.zeros((num_steps, scenario.expert_ranks), dtype=np.int64)
        own_S, parts = np.zeros(num_steps), dict.fromkeys(_PARTS, 0.0)
        most = mean = 0.0
        routed = dropped = 0
        weight = 1 / (num_steps * replicas)
        for step in range(num_steps):
            for replica, (decided, counts) in enumerate(self._decided(step)):
                rank_I, size = self._rules.instances.rank_I, scenario.expert_ranks
                load_W = np.bincount(rank_I, decided.counts_WI.sum(0), size).astype(np.int64)
                before = int(counts.claims_WE.sum() + counts.exempt_WE.sum())
                most += float(load_W.max()) * weight
                mean += before / size * weight
                routed, dropped = routed + decided.routed, dropped + decided.dropped
                self.is_exact &= decided.is_exact
                if self._exchanges is not None:
                    exchanged = self._exchanges.of(decided, counts)
                    self.consensus += exchanged.consensus_bytes * weight
                    found = self._time(decided, counts, exchanged, replica)
                    seconds_RS[replica, step] += sum(found.values())
                    for name, value in found.items():
                        parts[name] += value * weight
                    own_S[step] = own_S[step] if replica else sum(found.values())
                if replica == 0:
                    rows_SW[step] = load_W
        return LayerPrediction(
            layer=traffic.layers[self._place],
            rows_SW=rows_SW,
            seconds_S=own_S,
            most_rows=most,
            mean_rows=mean,
            routed=routed,
            dropped=dropped,
            parts=parts,
        )

    def _time(
        self, decided: Decided, counts: StepCounts, exchanged: Exchanged, replica: int
    ) -> dict[str, float]:
        costs, scenario = self._simulator._costs, self._scenario
        if costs is None:
            return {}
        size, first = scenario.expert_ranks, replica * scenario.expert_ranks
        slowness_W = np.array([scenario.slower.get(first + rank, 1.0) for rank in range(size)])
        rows_I = decided.counts_WI.sum(0)
        found = layer_time(
            costs,
            np.array(counts.tokens_W),
            np.split(rows_I, self._rules.instances.first_instances[1:-1]),
            exchanged,
            slowness_W,
            scenario.ranks_per_node,
        )
        self.waiting += found.waiting / (len(self._traffic.loads_SLE) * scenario.replicas)
        parts = {name: getattr(found, name) for name in _PARTS[:-1]}
        return parts | {"host": found.seconds - sum(parts.values())}

    def _decided(self, step: int) -> list[tuple[Decided, StepCounts]]:
        """Return the decisions of every replica in a step."""
        scenario, traffic, rules = self._scenario, self._traffic, self._rules
        if scenario.replicas == 1 and traffic.keys_S3 is not None:
            claims = self._simulator._claims.get(tuple(traffic.keys_S3[step].tolist()))
            if claims is not None and self._knows_phases(claims, step):
                return [self._from_claims(claims)]
        seed = (self._simulator._seed, step, self._place, zlib.crc32(traffic.name.encode()))
        random = np.random.default_rng(seed)
        load_E = traffic.loads_SLE[step, self._place][rules.instances.expert_of_home_E]
        prefill, decode = traffic.tokens_S2[step].tolist()
        found = []
        for part_E in over_replicas(load_E, scenario.replicas, random):
            counts = self._counts(part_E, prefill / scenario.replicas, decode / scenario.replicas)
            found.append((rules.decide(counts), counts))
        return found

    def _counts(self, load_E: np.ndarray, prefill: float, decode: float) -> StepCounts:
        """Return counts of which only prefill tokens compete, decode ones in proportion."""
        size, total = self._scenario.expert_ranks, prefill + decode
        loads_WE = over_ranks(load_E, size)
        tokens_W = even(round(total), size)
        competes = round(prefill)
        exempt_WE = np.zeros_like(loads_WE)
        if self._scenario.capacity.policy != "none" and decode:
            exempt_WE = (loads_WE * (decode / total)).round().astype(np.int64)
            self.is_exact &= not prefill
        else:
            competes = sum(tokens_W)
        if competes and self._scenario.capacity.consensus == "local":
            self.is_exact = False  # what a rank drops depends on which of the rows are its own
        return StepCounts(
            claims_WE=loads_WE - exempt_WE,
            exempt_WE=exempt_WE,
            tokens_W=tokens_W,
            eligible_W=even(competes, size),
        )

    def _knows_phases(self, claims: StepClaims, step: int) -> bool:
        """Return whether it is known which recorded tokens compete: without a policy the recording
        says so of none, which matters where some are decode tokens.
        """
        if self._scenario.capacity.policy == "none" or not self._traffic.tokens_S2[step, 1]:
            return True
        return bool((claims.layers[self._rules.layer].request_T >= 0).all())

    def _from_claims(self, claims: StepClaims) -> tuple[Decided, StepCounts]:
        rules, trace = self._rules, self._traffic.trace
        assert trace is not None
        own, ranks_T = claims.layers[rules.layer], claims.ranks[rules.layer]
        recorded, size = int(trace.ranks_S.max()), self._scenario.expert_ranks
        rank_T = rank_of_tokens(own, ranks_T, recorded, size, claims.first_rank)
        competes = rules.capacity.policy != "none"
        counts = counts_of(own, rank_T, rules, competes=competes)
        if rules.capacity.consensus == "global" and rules.binds(counts.as_step()):
            return decide_claims(rules, own, rank_T, counts, competes), counts
        return rules.decide(counts), counts


_PARTS: tuple[str, ...] = ("local", "consensus", "dispatch", "experts", "combine", "host")
