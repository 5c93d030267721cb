"""Megatron router: the router of a Megatron-Core MoE layer with Lockstep's capacity.

See `megatron.py` for its use. Importing this module imports Megatron-Core. Written for 0.16 to
0.19, whose routers got further keyword arguments from version to version: unknown ones are passed
on.

Legend: T tokens on this rank (sequence * batch), E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from engine.config import CapacityConfig, RequestPhase
from engine.interop.capacity_gate import CapacityGate
from engine.interop.megatron_settings import check_settings, group_of, router_scores, router_spec
from engine.profiling.loads import LayerDrops


class CapacityRouter(TopKRouter):
    """Megatron's top-k router, with a capacity applied to its choice."""

    phase: RequestPhase = "prefill"  # of the tokens of the next calls; the same on every rank

    def __init__(
        self, config: Any, pg_collection: Any = None, *, capacity: CapacityConfig, **kwargs: Any
    ) -> None:
        """Build Megatron's router, with a capacity; policy none leaves it as Megatron's.

        Args:
            config: a TransformerConfig.
            pg_collection: its `ep` is the capacity group; by default the expert-parallel group of
                `parallel_state`.

        Raises:
            ValueError: settings of Megatron that are incompatible with a capacity policy.
        """
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.capacity = capacity
        self._gate: CapacityGate | None = None
        self._last_drops: LayerDrops | None = None
        if capacity.policy == "none":
            return
        # A collection has only the groups that it was built with.
        self._expert_group = group_of(
            getattr(pg_collection, "ep", None)
            or parallel_state.get_expert_model_parallel_group(check_initialized=False)
        )
        expert_tensor = group_of(
            getattr(pg_collection, "expt_tp", None)
            or parallel_state.get_expert_tensor_parallel_group(check_initialized=False)
        )
        # Checked here and not per call: Megatron's inference switches sequence_parallel off for the
        # layers that are no MoE layers, in the config that all layers share.
        check_settings(
            config,
            tensor_ranks=group_of(self.tp_group).size,
            expert_tensor_ranks=expert_tensor.size,
        )
        self._make_gate()

    def set_layer_number(self, layer_number: int) -> None:
        """Set the layer's number, which moe.capacity.order = random hashes and errors name."""
        super().set_layer_number(layer_number)
        if self._gate is not None:
            self._make_gate()

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return combine weights [T, E] in Megatron's dtype and bool [T, E], after capacity.

        Args:
            logits: [sequence, batch, E].
            padding_mask: bool [sequence, batch], True for padding, as Megatron's code reads it (its
                docstrings say the opposite).

        Collective over EP: every rank must call, T may be 0.

        Raises:
            ValueError: a score is NaN or infinite on some rank, raised on every rank; or the mask
                has another number of tokens.
        """
        probs_TE, chosen_TE = super().routing(logits, padding_mask=padding_mask, **kwargs)
        gate = self._gate
        if gate is None or self.phase not in self.capacity.phases:
            self._last_drops = LayerDrops()
            return probs_TE, chosen_TE
        scores_TE = router_scores(logits.reshape(probs_TE.shape), self.score_function)
        padding_T = None
        if padding_mask is not None:
            padding_T = padding_mask.reshape(-1).bool()
            if padding_T.numel() != len(probs_TE):
                raise ValueError(
                    f"padding_mask: has {padding_T.numel()} entries for {len(probs_TE)} tokens of "
                    "this rank; give it the shape of logits without the experts"
                )
        self._last_drops = None
        return gate.apply(scores_TE, probs_TE, chosen_TE, padding_T)

    @property
    def last_drops(self) -> LayerDrops:
        """Assignments of this rank's tokens that the last call routed, dropped and added, and their
        weights. All 0 without capacity, by policy or phase, and before any call.
        """
        if self._last_drops is None:
            # SYNC: of a call's sums, only when they are read.
            self._last_drops = (
                LayerDrops() if self._gate is None else self._gate.drops.read_and_reset()
            )
        return self._last_drops

    def _make_gate(self) -> None:
        self._gate = CapacityGate(
            router_spec(self.config),
            self.capacity,
            group=self._expert_group,
            layer=self.layer_number or 0,
        )
