"""Decoder: the model that every family shares. Embedding, layers, final norm and head.

Built from a family's `ModelSpec` (`spec.py`); one call per step. Attention is sharded over
`topology.tensor` and experts over `topology.expert`; everything else is replicated.

The layers are a generator: with moe.overlap.two_batch a step runs as two micro-batches, and the
generator yields where one waits for its rows, so that the other computes (two-batch overlap,
`moe/dispatch/two_batch.py`).

Legend: T tokens of the step, R of them whose final hidden state is read, S rows that need logits, D
model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from engine.config import MoEConfig
from engine.distributed.groups import Topology
from engine.layers.attention import share_query_scales
from engine.layers.attention_backends.backend import AttentionBackend
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS
from engine.layers.gated_delta import GatedDelta
from engine.layers.kv_cache import KVCache
from engine.layers.parallel import empty_parameter
from engine.layers.precision import compute_dtype
from engine.layers.rotary import RotaryTable
from engine.layers.step_inputs import ReadRows, StepTensors
from engine.models.decoder_layer import DecoderLayer, cache_of
from engine.models.decoder_slots import decoder_slots, ignored_tensors
from engine.models.spec import ModelSpec
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.dispatch.two_batch import Steps, interleave, run_to_end
from engine.moe.layer import MoELayer
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.placement import Placement
from engine.moe.step import MoEStep
from engine.ops.linear import linear
from engine.ops.panels import to_panels
from engine.ops.rms_norm import add_rms_norm, rms_norm
from engine.profiling.phase_clock import Phase
from engine.profiling.telemetry import Telemetry
from engine.weights.slot import WeightSlot


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """Tokens of a step over all ranks of the expert-parallel group; the same on every rank."""

    all: int
    read: int  # tokens whose final hidden state is read
    use_copies: bool = True  # whether rows may move to copies of experts
    bucket: int | None = None  # see `moe_step.static_bucket`


class CausalLM(nn.Module):
    """A decoder-only language model and its head.

    Parameters are uninitialised until the `weight_slots` are filled.

    Args:
        dtype: of the weight matrices; the model computes in `CausalLM.dtype`.
        placement: of the experts; None: contiguous homes.
        layouts: by layer, how experts are held in few bits; those of other layers are in `dtype`.

    Raises:
        ValueError: when the ranks do not fit the model's heads or experts.
    """

    runs_last_whole = False  # the last layer runs only the rows that are read, where it can

    def __init__(
        self,
        spec: ModelSpec,
        rotary: RotaryTable,
        *,
        max_model_len: int,
        topology: Topology,
        config: MoEConfig,
        device: torch.device,
        dtype: torch.dtype,
        placement: Placement | None = None,
        layouts: Mapping[int, ExpertLayouts] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.weight_dtype = spec, dtype
        self.dtype = compute_dtype(dtype, device)  # of hidden states, KV cache and norms
        self.placement = placement
        self.quantization = "none"  # how weights are held (model.quantization), for reports
        self.max_model_len = max_model_len  # positions it can run
        self.vocab_size, self.num_layers = spec.vocab_size, len(spec.layers)
        self.telemetry, self.rotary = Telemetry(), rotary
        shape = (spec.vocab_size, spec.hidden)
        self.embedding_VD = empty_parameter(*shape, device=device, dtype=dtype)
        self.head_VD = self.embedding_VD
        if not spec.tied_embeddings:
            self.head_VD = empty_parameter(*shape, device=device, dtype=dtype)
        self.final_norm_D = empty_parameter(spec.hidden, device=device, dtype=self.dtype)
        self.row_buffers = RowBuffers()
        tuner = ChunkTuner(device)
        self._layers = [
            DecoderLayer(
                layer,
                layer=i,
                topology=topology,
                config=config,
                device=device,
                dtype=dtype,
                row_buffers=self.row_buffers,
                tuner=tuner,
                placement=placement,
                layouts=(layouts or {}).get(i),
            )
            for i, layer in enumerate(spec.layers)
        ]
        self.layers = nn.ModuleList(self._layers)
        # The MoE layers in order, and the cache that the model needs on this rank.
        self.moe_layers = [layer.mlp for layer in self._layers if isinstance(layer.mlp, MoELayer)]
        self.kv_spec, self.kv_dtype = cache_of(self._layers), self.dtype
        self._attentions = [
            layer.attention for layer in self._layers if not isinstance(layer.attention, GatedDelta)
        ]
        self.attention_kinds = tuple(attention.kind for attention in self._attentions)
        self.attention_backend: AttentionBackend = PAGED_KERNELS
        share_query_scales((layer.attention for layer in self._layers), max_model_len, device)

    def set_attention(self, backend: AttentionBackend) -> None:
        """Set the kernels that attend, in all layers with keys and values."""
        self.attention_backend = backend
        for attention in self._attentions:
            attention.backend = backend

    def set_telemetry(self, telemetry: Telemetry) -> None:
        """Set where this model and its layers record their measurements."""
        self.telemetry = telemetry
        for index, layer in enumerate(self._layers):
            layer.attention.sums.set_telemetry(telemetry, index)
        for moe in self.moe_layers:
            moe.telemetry = telemetry

    @property
    def top_k(self) -> list[int]:
        """Experts per token in each layer, 0 in a dense one."""
        experts = (layer.mlp for layer in self._layers)
        return [mlp.spec.router.top_k if isinstance(mlp, MoELayer) else 0 for mlp in experts]

    @property
    def max_collectives(self) -> int:
        """Upper bound on the collectives of a step that the phase clock records."""
        micro_batches = 2 if any(moe.layout_policy.two_batch for moe in self.moe_layers) else 1
        sums = sum(layer.attention.sums.num_collectives for layer in self._layers)
        return micro_batches * sums + sum(moe.max_collectives for moe in self.moe_layers)

    def finalize_weights(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Rearrange the loaded weights, in place, into the layouts that the kernels read fastest.

        Args:
            on_progress: called once per layer, as a sign of progress.
        """
        for layer in self._layers:
            on_progress()
            layer.attention.finalize_weights()
            layer.mlp.finalize_weights()
            if layer.parallel_dense is not None:
                layer.parallel_dense.finalize_weights()
        if self.head_VD is not self.embedding_VD:
            to_panels(self.head_VD)

    def forward(
        self,
        step: StepTensors,
        kv: KVCache,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
    ) -> torch.Tensor:
        """Return the hidden states after the final norm of the rows that are read, [R, D].

        Args:
            kv: written with the keys and values, or the states, of all T tokens.
            moe_step: which of this rank's tokens are subject to expert capacity; None: none.
            group: tokens of this step over all ranks of the expert-parallel group, where known.

        After its key and value projections the last layer runs only the rows that are read, unless
        tokens are subject to capacity: then all of them count in its loads.

        Collective over EP and TP: every rank must call, T and R may be 0.
        """
        return run_to_end(self.steps(step, kv, moe_step, group))

    def splits_batch(self, group_tokens: int) -> bool:
        """Return whether a step is to run as two micro-batches, by `forward_two_batch`.

        Args:
            group_tokens: tokens of the step over all ranks, none of them subject to capacity.

        The same on every rank.
        """
        return any(moe.layout_policy.splits_batch(group_tokens) for moe in self.moe_layers[:1])

    def forward_two_batch(
        self, batches: tuple[StepTensors, StepTensors], kv: KVCache, group: GroupTokens
    ) -> torch.Tensor:
        """`forward` of a step split into two micro-batches between its sequences.

        Attention of one micro-batch runs while the rows of the other are in flight. Either may be
        empty. Collective over EP and TP: every rank must call.
        """
        share = GroupTokens(group.all // 2, group.read // 2, group.use_copies)
        parts = [self.steps(step, kv, None, share, index) for index, step in enumerate(batches)]
        return torch.cat(interleave(parts))

    def steps(
        self,
        step: StepTensors,
        kv: KVCache,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
        micro_batch: int | None = None,
    ) -> Steps[torch.Tensor]:
        """Generator form of `forward`: yields while the rows of a micro-batch are in flight.

        Args:
            micro_batch: 0 or 1 in a two-batch step, None for a whole step (never yields).
        """
        eps, layers, clock = self.spec.norm_eps, self._layers, self.telemetry.clock
        num_tokens, last = step.token_ids_T.shape[0], self.num_layers - 1
        group_tokens, tunes = None if group is None else group.all, True
        uses_copies = group is None or group.use_copies
        bucket = None if group is None else group.bucket
        live_T = step.live_T
        cos_TR, sin_TR = self.rotary.rows(step.positions_T)
        residual_TD = F.embedding(step.token_ids_T, self.embedding_VD).to(self.dtype)
        x_TD = rms_norm(residual_TD, layers[0].input_norm_D, eps)
        next_norms = [*(layer.input_norm_D for layer in layers[1:]), self.final_norm_D]
        read = shortcut_TD = None
        for index, (layer, k_cache, v_cache, next_norm_D) in enumerate(
            zip(layers, kv.keys, kv.values, next_norms, strict=True)
        ):
            clock.enter(Phase.ATTENTION, index, num_tokens)
            if index == last and (moe_step is None or not moe_step.runs_last_whole):
                # Only the rows that are read; fewer tokens than in the other layers, so such a call
                # does not tune the chunks.
                read = step.read
                moe_step = None if moe_step is None else moe_step.last
                if group is not None:
                    group_tokens, tunes = group.read, group.read == group.all
            if num_tokens:  # the same on all ranks of the tensor group
                x_TD = layer.attention(x_TD, cos_TR, sin_TR, step, k_cache, v_cache, read)
            else:
                layer.attention.sums.record_skipped()
            clock.enter(Phase.OTHER, index)
            if read is not None:
                residual_TD = residual_TD.index_select(0, read.rows_R)
                if shortcut_TD is not None:
                    shortcut_TD = shortcut_TD.index_select(0, read.rows_R)
            x_TD = add_rms_norm(x_TD, residual_TD, layer.mlp_norm_D, eps)
            if isinstance(layer.mlp, MoELayer):
                has_table = layer.mlp.gate.table_VK is not None
                token_ids_T = _token_ids(step, read) if has_table else None
                call = moe_step, group_tokens, micro_batch, tunes, uses_copies, token_ids_T, bucket
                routed_TD = yield from layer.mlp.steps(x_TD, *call, live_T=live_T)
                if layer.parallel_dense is None:
                    x_TD = routed_TD
                else:
                    x_TD, shortcut_TD = layer.parallel_dense(x_TD), routed_TD
            else:
                x_TD = layer.mlp(x_TD)
                if shortcut_TD is not None:
                    x_TD, shortcut_TD = x_TD.add_(shortcut_TD), None
            x_TD = add_rms_norm(x_TD, residual_TD, next_norm_D, eps)
        if read is None and step.read is not None:
            x_TD = x_TD.index_select(0, step.read.rows_R)
        return x_TD

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [S, V] of rows [S, D] of `forward`'s result."""
        return linear(hidden_SD, self.head_VD).float()

    def untie_head(self) -> torch.Tensor:
        """Give the head memory of its own, uninitialised, and return it."""
        vocab, hidden = self.embedding_VD.shape
        device, dtype = self.embedding_VD.device, self.embedding_VD.dtype
        self.head_VD = empty_parameter(vocab, hidden, device=device, dtype=dtype)
        return self.head_VD

    def weight_slots(self, checkpoint: Collection[str] = ()) -> Iterator[WeightSlot]:
        """Yield a slot for every checkpoint tensor that this rank needs; see `decoder_slots`."""
        return decoder_slots(
            self.spec,
            self._layers,
            embedding_VD=self.embedding_VD,
            head_VD=self.head_VD,
            final_norm_D=self.final_norm_D,
            untie=self.untie_head,
            checkpoint=checkpoint,
        )

    def ignored_weights(self, checkpoint: Collection[str] = ()) -> tuple[str, ...]:
        """Return regular expressions of checkpoint tensors that no rank needs."""
        return ignored_tensors(self.spec, checkpoint)


def _token_ids(step: StepTensors, read: ReadRows | None) -> torch.Tensor:
    """Return the token ids of the rows that a layer runs, int64. read: None: all."""
    return step.token_ids_T if read is None else step.token_ids_T.index_select(0, read.rows_R)
