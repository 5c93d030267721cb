"""The Mixture-of-Experts layer, expert-parallel. Read this file first.

One call on every rank of the expert-parallel group, whatever tokens each has (none is fine):

    1. scatter   tensor ranks have the same tokens: each takes its part     token_shard.py
    2. route     gate -> scores, top-k experts, combine weights             gate.py, router.py
    3. agree     overloaded experts drop, idle ones are filled, and every   layer_agreement.py,
                 rank learns what every rank sends to every expert          agreement.py
                 where experts have copies: which rows these compute        placement/,
                                                                            copies_agreement.py
    4. plan      which row goes where, frozen; one plan per chunk           plan.py,
                                                                            chunk_layout.py
    5. dispatch  all-to-all of rows to the ranks of their experts, one      pipeline.py,
                 for all experts of a rank where that moves less            dedup.py, payload.py
    6. experts   the local experts' feed-forward                            local_experts.py
    7. combine   all-to-all back, then each token sums its experts' rows    pipeline.py
                 by weight, k = 0 .. K - 1, then its extras
    8. shared    tokens are added by the weights of their zero experts,   zero_experts.py
                 which no step between saw (`router.py`); then the
                 shared expert, if there is one, is added (it ran
                 during step 3, or where it is balanced during steps 5
                 and 6); a tensor group gathers its tokens            shared_rows.py

Without a capacity policy, or in a step in which it cannot bind, step 3 only exchanges the loads. A
small step of that kind may take steps 3 to 7 without counts: layer_static.py, static_exchange.py.
With moe.dispatch.transport other than nccl counts stay on the device: layer_device.py, transports/.

The sum in step 7 runs on the token's own rank in the router's order, so a token's result does not
depend on how many ranks there are. Nor does what is dropped, under `global` consensus. With
`moe.dispatch.partial_sums` the ranks of the experts sum first, in the order of their experts: the
sum's grouping then depends on which experts share a rank, and results on the ranks by rounding.

Legend: T tokens of the tensor group, t tokens of this rank, D model dim, K top-k, M columns of the
decision (K, with extras one more per local expert), E experts, e experts on this rank, S rows sent.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from engine.moe.dispatch.chunk_tuner import Trial
from engine.moe.dispatch.shared_rows import SharedWork
from engine.moe.dispatch.two_batch import Steps, run_to_end
from engine.moe.layer_parts import LayerParts
from engine.moe.layer_static import STATIC
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.ops.permute import combine_rows
from engine.ops.zero_experts import add_zero_experts
from engine.profiling.phase_clock import Phase


class MoELayer(LayerParts):
    """Routed experts distributed over `topology.expert`, plus an optional shared expert, which
    every rank has. Arguments: see `LayerParts`.
    """

    def forward(
        self,
        x_TD: torch.Tensor,
        step: MoEStep | None = None,
        group_tokens: int | None = None,
        token_ids_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the layer's output [T, D] in x's dtype. See `steps` for the arguments.

        Collective over EP: every rank must call, T may be 0.
        """
        return run_to_end(self.steps(x_TD, step, group_tokens, token_ids_T=token_ids_T))

    def steps(
        self,
        x_TD: torch.Tensor,
        step: MoEStep | None = None,
        group_tokens: int | None = None,
        micro_batch: int | None = None,
        tunes: bool = True,
        uses_copies: bool = True,
        token_ids_T: torch.Tensor | None = None,
        bucket: int | None = None,
        routing: Routing | None = None,
        live_T: torch.Tensor | None = None,
    ) -> Steps[torch.Tensor]:
        """Generator form of `forward` for two-batch overlap: yields while rows are in flight.

        Collective over EP: every rank must call.

        Args:
            x_TD: T may be 0.
            step: which of this rank's tokens are subject to capacity; None: none.
            group_tokens: tokens of all ranks in this step, equal on every rank: few are not cut
                into chunks, nor deduplicated. None: as configured.
            micro_batch: 0 or 1 in a step of two, None for a whole step, which never yields.
            tunes: see `LayoutPolicy.begin_trial`.
            uses_copies: whether rows may move to copies, the same on every rank.
            token_ids_T: int64, read where the router's spec has a token_table.
            bucket: of a step that may take the static exchange; see `layer_static.py`.
            routing: of this rank's tokens, if and only if the router is external.
            live_T: bool, read where the static exchange is taken: tokens that exist, among those
                that a CUDA graph was captured with; None: all. Outputs of others mean nothing.
        """
        clock = self.telemetry.clock
        x_tD = self._token_shard.scatter(x_TD)
        assert (routing is None) == (self.spec.router.external is None), "routing and spec disagree"
        if routing is None:
            clock.enter(Phase.GATE, self.layer, x_tD.shape[0])
            routing = self.route(x_tD, token_ids_T)
        shared = None if self.shared is None else SharedWork(self.shared, x_tD)
        own_tD, zero_t = x_tD, routing.zero_weight_T
        x_tD = self.rows.before(x_tD, routing, self.gate.expert_scale_E)
        way = self.static.begin_trial(bucket, step, micro_batch, group_tokens, tunes)
        if bucket is not None and way.chunks == STATIC:
            if live_T is not None:
                ids_TK = routing.topk_ids_TK.where(self._token_shard.scatter(live_T)[:, None], -1)
                routing = replace(routing, topk_ids_TK=ids_TK)
            weights_TK = self._result_weights(routing)
            early = None if shared is None else shared.run
            with way:
                out_tD = self.static.run(
                    x_tD, routing, weights_TK, bucket, step, self.telemetry, early, uses_copies
                )
            return self._finish(out_tD, own_tD, zero_t, shared, x_TD.shape[0])
        if self.on_device.serves(step, micro_batch):
            out_tD = self.on_device.run(
                x_tD,
                routing,
                self.gate.expert_scale_E,
                step,
                group_tokens,
                self.telemetry,
                None if shared is None else shared.run,
                weights_on_input=self.rows.weights_on_input,
            )
            return self._finish(out_tD, own_tD, zero_t, shared, x_TD.shape[0])
        trial = Trial(1)
        if micro_batch is None:
            trial = self.layout_policy.begin_trial(group_tokens, tunes)
        layout = self.layout_policy.choose(
            group_tokens, trial.chunks, costs_exchange=self.agreement.costs_exchange(step)
        )
        pipeline = self._pipelines[micro_batch or 0]
        on_order = None
        if layout.sends_plain_rows and not self.agreement.adds_extras:
            on_order = partial(pipeline.pack, x_tD, clock)
        # Which shared rows stay follows from the counts, where some may move.
        early, late = (None if shared is None else shared.run), None
        if layout.moves_shared:
            early, late = None, early
        way.start()
        decision, plans = self.agreement.agree(
            routing, step, self.telemetry, early, layout, micro_batch, on_order, uses_copies
        )
        if self.rows.weights_on_input:
            decision = self.rows.counted_once(decision)
        elif self.gate.expert_scale_E is not None:
            decision = self.agreement.scaled(decision, self.gate.expert_scale_E)
        with trial:
            terms = plans[0].terms(decision.weights_TM)
            moves = plans[0].shared_moves
            rounds = self.agreement.plan_rounds(
                decision, layout, self.row_limit, group_tokens, micro_batch
            )
            if rounds:
                moves = None
                terms = decision.order.slot_TK, decision.weights_TM
                if late is not None:
                    late()
                rows_SD = pipeline.rounds(x_tD, decision.weights_TM, rounds, clock)
            else:
                rows_SD = yield from pipeline.steps(
                    x_tD,
                    decision.weights_TM,
                    plans,
                    clock,
                    yields=micro_batch is not None,
                    packed=on_order is not None,
                    overlap=None if late is None else partial(late, moves),
                )
            if self.layout_policy.moves_shared:
                moved = 0 if moves is None else moves.num_moved_all
                self.telemetry.loads.add_shared(self.layer, moved)
            clock.enter(Phase.PLAN, self.layer)
            out_tD = combine_rows(rows_SD, *terms)
        way.stop()
        return self._finish(out_tD, own_tD, zero_t, shared, x_TD.shape[0])

    def _result_weights(self, routing: Routing) -> torch.Tensor:
        """Return the weights of the experts' results where nothing is dropped, float32 [T, K]."""
        weights_TK, scale_E = routing.topk_weights_TK, self.gate.expert_scale_E
        if self.rows.weights_on_input:
            return torch.ge(routing.topk_ids_TK, 0, out=torch.empty_like(weights_TK))
        return weights_TK if scale_E is None else weights_TK * scale_E[routing.topk_ids_TK]

    def _finish(
        self,
        out_tD: torch.Tensor,
        own_tD: torch.Tensor,
        zero_t: torch.Tensor | None,
        shared: SharedWork | None,
        num_tokens: int,
    ) -> torch.Tensor:
        """Return the outputs of the tensor group's tokens [T, D].

        Args:
            out_tD: the combined rows of this rank's tokens.
            own_tD: its tokens.
            zero_t: float32, the weights of their zero experts; None: there are none.
            shared: of the shared expert, which has run; None: there is none.
            num_tokens: T.
        """
        clock = self.telemetry.clock
        out_tD = self.rows.after(out_tD)
        if zero_t is not None:
            out_tD = add_zero_experts(out_tD, own_tD, zero_t)
        if shared is not None:
            out_tD = shared.add_to(out_tD)
        out_TD = self._token_shard.gather(out_tD, num_tokens, clock, self.layer)
        clock.enter(Phase.OTHER, self.layer)
        return out_TD

    def route(self, x_tD: torch.Tensor, token_ids_T: torch.Tensor | None = None) -> Routing:
        """Step 2: return the scores, experts and combine weights of this rank's tokens.

        token_ids_T: of the tensor group's tokens; see `steps`.
        """
        token_ids_t = None if token_ids_T is None else self._token_shard.scatter(token_ids_T)
        return self.gate.route(x_tD, token_ids_t)
