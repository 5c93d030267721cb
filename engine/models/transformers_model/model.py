"""Transformers' decoder as a model of this engine: the interface of `CausalLM`.

Transformers runs embedding, norms, projections, rotary embedding, routers, dense and shared MLPs.
Keys and values go to the paged cache (`paged_layer.py`), routed experts to this engine's dispatch
(`routed_experts.py`), weights through this engine's reader (`weights.py`).

The tokens of a step are one flattened sequence, a batch of 1, whose positions are those of their
own sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from engine.config import Config
from engine.distributed.errors import memory_in_words
from engine.distributed.groups import Topology
from engine.layers.attention_backends.backend import AttentionBackend
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS
from engine.layers.kv_cache import KVCache, KVSpec
from engine.layers.precision import compute_dtype
from engine.layers.step_inputs import StepTensors
from engine.models.checkpoint_buffers import BUFFERS
from engine.models.decoder import GroupTokens
from engine.models.spec import SparseSpec
from engine.models.transformers_model.fixed_rotary import fix_lengths
from engine.models.transformers_model.hooks import Given, enters
from engine.models.transformers_model.materialize import materialize
from engine.models.transformers_model.paged_layer import PagedLayer
from engine.models.transformers_model.plug_in import ATTENTION
from engine.models.transformers_model.probe import build_on_meta
from engine.models.transformers_model.routed_experts import RoutedExperts, RunningStep
from engine.models.transformers_model.settings import check_settings
from engine.models.transformers_model.spec import probed, read_spec
from engine.models.transformers_model.text_model import OTHER_PARTS
from engine.models.transformers_model.weights import (
    KeyMapping,
    dense_slots,
    expert_slots,
    with_tied_head,
)
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.dispatch.two_batch import Steps, run_to_end
from engine.moe.layer import MoELayer
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.placement import Placement
from engine.moe.step import MoEStep
from engine.profiling.phase_clock import Phase
from engine.profiling.telemetry import Telemetry
from engine.weights.slot import WeightSlot


class TransformersModel(nn.Module):
    """A decoder-only language model of transformers on this engine's cache and experts.

    Parameters are uninitialised until the `weight_slots` are filled.

    Args:
        hf_config: transformers' configuration.
        max_model_len: positions it can run.
        topology: of this rank.
        config: of the run.
        device, dtype: of the experts; the rest is in `dtype`, which on the CPU is float32.
        placement: of the experts; None: contiguous homes.
        layouts: by layer, how experts are held in few bits.

    Raises:
        ValueError: a setting that transformers' modules do not honour, or that does not fit the
            model.
    """

    runs_last_whole = True  # the last layer, too, runs all tokens

    def __init__(
        self,
        hf_config: Any,
        *,
        max_model_len: int,
        topology: Topology,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        placement: Placement | None = None,
        layouts: Mapping[int, ExpertLayouts] | None = None,
    ) -> None:
        super().__init__()
        check_settings(config, topology)
        self._found = found = probed(hf_config)
        self.spec = read_spec(hf_config)
        self.weight_dtype, self.dtype = dtype, compute_dtype(dtype, device)
        self.placement, self.quantization = placement, "none"
        self.max_model_len = max_model_len
        self.vocab_size, self.num_layers = self.spec.vocab_size, len(self.spec.layers)
        self.telemetry, self.row_buffers = Telemetry(), RowBuffers()
        causal = build_on_meta(hf_config, self.dtype, ATTENTION)
        self._mapping = KeyMapping(causal)
        ignored = getattr(causal, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = (*BUFFERS, *OTHER_PARTS, *ignored)
        self.running, tuner = RunningStep(), ChunkTuner(device)
        self._experts: list[tuple[str, RoutedExperts]] = []
        for call in found.experts:
            layer = call.layer
            mlp = self.spec.layers[layer].mlp
            assert isinstance(mlp, SparseSpec)
            moe = MoELayer(
                mlp.moe,
                layer=layer,
                topology=topology,
                config=config.moe,
                device=device,
                dtype=dtype,
                row_buffers=self.row_buffers,
                tuner=tuner,
                placement=None if placement is None else placement.layer(layer),
                precision="model" if placement is None else placement.precision,
                speeds_W=None if placement is None else placement.speeds_W,
                layouts=(layouts or {}).get(layer),
            )
            experts = RoutedExperts(moe, self.running, call.scores)
            self._experts.append((call.path, experts))
            parent, _, name = call.path.rpartition(".")
            block = causal.get_submodule(parent)
            setattr(block, name, experts)
            if call.scores is not None:
                block.get_submodule(call.scores.name).register_forward_hook(experts.take_logits)
            block.register_forward_pre_hook(enters(self, Phase.GATE, layer))
        for layer, call in enumerate(found.attention):
            module = causal.get_submodule(call.path)
            module.lockstep_attention = PagedLayer(layer, call.window, self.running)
            module.register_forward_pre_hook(enters(self, Phase.ATTENTION, layer))
            module.register_forward_hook(enters(self, Phase.OTHER, layer))
        with memory_in_words(
            f"model.max_model_len = {max_model_len}: a table of that many positions does not fit "
            "into memory; lower it"
        ):
            fix_lengths(causal, max_model_len, device, self.dtype)
        materialize(causal, device, self.dtype)
        causal.requires_grad_(False)
        experts_at = tuple(f"{path}." for path, _ in self._experts)
        self._tensors = {
            name: tensor
            for name, tensor in causal.state_dict(keep_vars=True).items()
            if not name.startswith(experts_at)
        }
        self._embedding, self._head = causal.get_input_embeddings(), causal.get_output_embeddings()
        # The head alone is run from final hidden states, through transformers' own code: some
        # families scale or bound their logits there.
        self.body = getattr(causal, causal.base_model_prefix)
        setattr(causal, causal.base_model_prefix, Given())
        self.causal = causal
        self.moe_layers = [experts.moe for _, experts in self._experts]
        first = found.attention[0]
        self.kv_spec = KVSpec(
            num_layers=self.num_layers,
            num_kv_heads=max(call.num_kv_heads for call in found.attention),
            key_dim=first.key_dim,
            value_dim=first.value_dim,
        )
        self.kv_dtype = self.dtype
        self.attention_kinds = tuple(call.kind for call in found.attention)
        self.attention_backend: AttentionBackend = PAGED_KERNELS

    def set_attention(self, backend: AttentionBackend) -> None:
        """Keep this engine's own kernels, the only ones that `choose_backend` gives this model."""
        assert backend is PAGED_KERNELS

    def set_telemetry(self, telemetry: Telemetry) -> None:
        """Set where this model and its layers record their measurements."""
        self.telemetry = telemetry
        for moe in self.moe_layers:
            moe.telemetry = telemetry

    @property
    def top_k(self) -> list[int]:
        """Experts per token in each layer, 0 in a dense one."""
        mlps = (layer.mlp for layer in self.spec.layers)
        return [mlp.moe.router.top_k if isinstance(mlp, SparseSpec) else 0 for mlp in mlps]

    @property
    def max_collectives(self) -> int:
        """Upper bound on the collectives of a step that the phase clock records."""
        return sum(moe.max_collectives for moe in self.moe_layers)

    def finalize_weights(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Rearrange the loaded experts, in place, into the layouts that the kernels read fastest.

        Args:
            on_progress: called once per layer, as a sign of progress.
        """
        for moe in self.moe_layers:
            on_progress()
            moe.finalize_weights()

    def forward(
        self,
        step: StepTensors,
        kv: KVCache,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
    ) -> torch.Tensor:
        """Return the hidden states after the final norm of the rows that are read, [R, D].

        Arguments as of `CausalLM.forward`; all layers run all tokens.

        Collective over EP: every rank must call, T and R may be 0.
        """
        return run_to_end(self.steps(step, kv, moe_step, group))

    def steps(
        self,
        step: StepTensors,
        kv: KVCache,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
    ) -> Steps[torch.Tensor]:
        """Generator form of `forward`, which never yields: there are no micro-batches."""
        yield from ()
        running = self.running
        running.step, running.kv, running.moe_step = step, kv, moe_step
        running.group_tokens = None if group is None else group.all
        running.uses_copies = group is None or group.use_copies
        running.bucket = None if group is None else group.bucket
        if not step.token_ids_T.shape[0]:  # no views of nothing: the experts alone
            weight = self._embedding.weight
            x_TD = weight.new_empty((0, weight.shape[1]), dtype=self.dtype)
            for _, experts in self._experts:
                width = experts.moe.spec.hidden
                experts.run_empty(x_TD.new_empty((0, width)))
        else:
            x_TD = self.body(
                input_ids=step.token_ids_T[None],
                position_ids=step.positions_T[None],
                use_cache=False,
            ).last_hidden_state[0]
        running.step = running.kv = running.moe_step = None
        if step.read is not None:
            x_TD = x_TD.index_select(0, step.read.rows_R)
        return x_TD

    def splits_batch(self, group_tokens: int) -> bool:
        """Return False: a step is never run as two micro-batches."""
        return False

    def forward_two_batch(
        self, batches: tuple[StepTensors, StepTensors], kv: KVCache, group: GroupTokens
    ) -> NoReturn:
        """Raise: `splits_batch` is never true."""
        raise NotImplementedError("transformers' layers run a step as a whole")

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [S, V] of rows [S, D] of `forward`'s result."""
        return self.causal(inputs_embeds=hidden_SD[None], use_cache=False).logits[0].float()

    def untie_head(self) -> torch.Tensor:
        """Give the head memory of its own, uninitialised, and return it."""
        self._head.weight = nn.Parameter(
            torch.empty_like(self._embedding.weight), requires_grad=False
        )
        return self._head.weight

    def weight_slots(self, checkpoint: Collection[str] = ()) -> list[WeightSlot]:
        """Return a slot for every checkpoint tensor that this rank needs.

        Args:
            checkpoint: names of the tensors in the checkpoint, which transformers' key mapping
                turns into those of the model; empty: the model's own names.

        Raises:
            ValueError: the mapping computes what is only read here.
        """
        sources = self._mapping.sources(checkpoint)
        tensors, tied_at = dict(self._tensors), None
        weight = self._embedding.weight
        if self.spec.tied_embeddings:  # two names, one tensor: the embedding's
            tied_at = [name for name, tensor in tensors.items() if tensor is weight][-1]
            del tensors[tied_at]
        slots = list(dense_slots(tensors, sources))
        layouts = {call.path: call.shape for call in self._found.experts}
        for path, experts in self._experts:
            slots += expert_slots(experts.moe, path, layouts[path], sources)
        if tied_at is not None:
            slots = list(with_tied_head(slots, weight, tied_at, checkpoint, self.untie_head))
        return slots

    def places(self, checkpoint: Collection[str]) -> dict[str, str]:
        """Return tensor of the checkpoint -> the model's tensor that it is, or is a part of."""
        found = self._mapping.sources(checkpoint)
        return {source.name: target for target, sources in found.items() for source in sources}

    def ignored_weights(self, checkpoint: Collection[str] = ()) -> tuple[str, ...]:
        """Return regular expressions of checkpoint tensors that no rank needs."""
        return self._ignored
