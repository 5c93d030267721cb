"""Layer static: which calls of an MoE layer take the static exchange, and what surrounds it there.

A step has a bucket (`dispatch/static_layout.py`) where its control messages allow the static
exchange; the same on every rank. A layer takes it where nothing keeps it from it (`obstacle`, which
follows from settings) and nobody competes for capacity. Under moe.dispatch.exchange: auto the CPU
ranks measure both ways, as `chunk_tuner.py` does chunks, and keep the counted one unless the other
is faster.

Legend: T tokens of this rank, D width of rows, K top-k, E experts, I instances.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config import MoEConfig
from engine.moe.dispatch.chunk_tuner import ChunkTuner, Trial
from engine.moe.dispatch.exchange import Exchange
from engine.moe.dispatch.layout_policy import LayoutPolicy
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.static_exchange import StaticExchange, serves
from engine.moe.dispatch.static_layout import BUCKETS, StaticLayout
from engine.moe.layer_agreement import LayerAgreement
from engine.moe.local_experts import LocalExperts
from engine.moe.router import Routing
from engine.moe.spec import MoESpec
from engine.moe.step import MoEStep
from engine.profiling.telemetry import Telemetry

COUNTED, STATIC = 1, 2  # the tuner's candidates


class StaticCalls:
    """The static exchange of one layer.

    Args:
        spec: of the layer.
        layer: its index.
        config: moe.
        rows: the formats that rows may be sent in.
        policy: of the layer's layouts.
        agreement: of the layer; it says where experts are and whether anybody competes.
        exchange: of the expert-parallel group.
        experts: of this rank.
        rank: of this process in the group.
        device: of the layer.
        tuner: of the chunks, whose `of_exchange` the layers of a model share.

    Raises:
        ValueError: moe.dispatch.exchange is static and the layer cannot take it.
    """

    def __init__(
        self,
        spec: MoESpec,
        *,
        layer: int,
        config: MoEConfig,
        rows: RowFormats,
        policy: LayoutPolicy,
        agreement: LayerAgreement,
        exchange: Exchange,
        experts: LocalExperts,
        rank: int,
        device: torch.device,
        tuner: ChunkTuner,
    ) -> None:
        self._layer, self._agreement, self._top_k = layer, agreement, spec.router.top_k
        self._rank, self._device, self._exchange = rank, device, exchange
        self._experts, self._sums = experts, config.dispatch.partial_sums
        self._policy = policy
        # Whether a step has a bucket is not known here: null may turn out to be counted.
        setting = config.dispatch.exchange or ("auto" if device.type == "cuda" else "counted")
        self.obstacle = _obstacle(rows, policy, experts, device)
        if setting == "static" and self.obstacle is not None:
            raise ValueError(f"moe.dispatch.exchange = 'static': {self.obstacle}; use auto")
        if setting == "counted":
            self.obstacle = "moe.dispatch.exchange is counted"
        self._tuner: ChunkTuner | None = None
        if setting == "auto" and self.obstacle is None and device.type == "cpu":
            self._tuner = tuner.of_exchange
            self._tuner.register(layer)
        self._some_none = spec.router.num_zero_experts > 0
        self._made: StaticExchange | None = None
        self.reset()

    @property
    def choices(self) -> dict[int, int]:
        """What CPU ranks have measured: COUNTED or STATIC, by `chunk_tuner.bucket_of` a step."""
        return {} if self._tuner is None else self._tuner.choices

    def reset(self) -> None:
        """Make the layout anew, where instances have changed: between steps, so that no call
        uploads anything. A CUDA graph captured before reads the tables of old.
        """
        if self.obstacle is not None:
            return
        layout = StaticLayout(
            self._agreement.instances,
            self._rank,
            self._top_k,
            self._sums,
            self._device,
            some_none=self._some_none,
        )
        if self._device.type == "cuda":
            for bucket in BUCKETS:
                layout.prepare(bucket)
        self._made = StaticExchange(layout, self._exchange, self._experts, self._layer)

    @property
    def exchange(self) -> StaticExchange:
        """The exchange over the layer's instances, where there is no obstacle."""
        assert self._made is not None, self.obstacle
        return self._made

    def begin_trial(
        self,
        bucket: int | None,
        step: MoEStep | None,
        micro_batch: int | None,
        group_tokens: int | None,
        tunes: bool,
    ) -> Trial:
        """Return the way of one call, COUNTED or STATIC as `chunks` of a trial, to be timed where
        the ways are still compared. Collective over EP: every rank must call.

        Args:
            bucket: of the step; None: it has none.
            step: which tokens are subject to capacity.
            micro_batch: of a step of two, which is always counted.
            group_tokens: tokens of the call over all ranks.
            tunes: whether the call has the shape of the other layers' calls in its step.
        """
        if (
            bucket is None
            or self.obstacle is not None
            or micro_batch is not None
            or self._agreement.applies(step)
        ):
            return _COUNTED
        tuner = self._tuner
        if tuner is None:
            return _STATIC
        if group_tokens is None or not tunes:
            return _COUNTED
        if (costs := tuner.due(self._layer, group_tokens)) is not None:
            tuner.choose(group_tokens, self._policy.add_times(costs))
        return tuner.begin_trial(self._layer, group_tokens, lambda _: (COUNTED, STATIC))

    def run(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        weights_TK: torch.Tensor,
        bucket: int,
        step: MoEStep | None,
        telemetry: Telemetry,
        overlap: Callable[[], None] | None,
        uses_copies: bool,
    ) -> torch.Tensor:
        """Return the sums of this rank's tokens [T, D]. Collective over EP: every rank must call.

        Args:
            x_TD: rows to send, as `ExpertRows.before` makes them.
            routing: of this rank's tokens.
            weights_TK: float32 combine weights of the results.
            bucket: of the step.
            step: which tokens are counted.
            telemetry: of the layer.
            overlap: work to do while the rows are gathered.
            uses_copies: whether rows may move to copies, the same on every rank.
        """
        exchange = self.exchange
        uses_copies = uses_copies and not self._agreement.low_bit_copies
        instance_TK = exchange.layout.instances_of(routing.topk_ids_TK, bucket, uses_copies)
        out_TD, load_I = exchange(x_TD, instance_TK, weights_TK, bucket, telemetry.clock, overlap)
        self._agreement.stats.add_static(telemetry, routing, load_I, step)
        return out_TD


_COUNTED, _STATIC = Trial(COUNTED), Trial(STATIC)


def _obstacle(
    rows: RowFormats, policy: LayoutPolicy, experts: LocalExperts, device: torch.device
) -> str | None:
    """Return why a layer cannot take the static exchange; None: it can."""
    if policy.moves_shared:
        return "moe.shared_expert = balanced moves rows by their counts"
    if rows.payload != rows.dtype:
        return "moe.dispatch.dtype sends rows in another dtype than the model's"
    if not serves(rows.width, rows.dtype, rows.payload):
        return f"rows of {rows.width} numbers do not end at a multiple of 8 bytes"
    if device.type == "cuda" and not experts.takes_device_counts:
        return (
            f"the experts (moe.experts.backend: {experts.name}) take their counts on the host; "
            "only grouped_mm in the model's precision reads them on the device"
        )
    return None
