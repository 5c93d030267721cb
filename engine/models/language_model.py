"""Language model: what the engine needs of a model, whoever has built its decoder.

`CausalLM` (`decoder.py`) is this engine's own, `TransformersModel` that of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import torch

from engine.layers.attention_backends.backend import AttentionBackend, AttentionKind
from engine.layers.kv_cache import KVCache, KVSpec
from engine.layers.step_inputs import StepTensors
from engine.models.decoder import GroupTokens
from engine.models.spec import ModelSpec
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.two_batch import Steps
from engine.moe.layer import MoELayer
from engine.moe.placement.placement import Placement
from engine.moe.step import MoEStep
from engine.profiling.telemetry import Telemetry
from engine.weights.slot import WeightSlot


class LanguageModel(Protocol):
    """A decoder-only language model and its head; see `CausalLM` for what each part means."""

    spec: ModelSpec
    weight_dtype: torch.dtype
    dtype: torch.dtype
    placement: Placement | None
    quantization: str
    max_model_len: int
    vocab_size: int
    num_layers: int
    telemetry: Telemetry
    row_buffers: RowBuffers
    moe_layers: list[MoELayer]
    kv_spec: KVSpec
    kv_dtype: torch.dtype  # of keys and values in the cache
    attention_kinds: tuple[AttentionKind, ...]  # of the layers with keys, in order
    attention_backend: AttentionBackend
    runs_last_whole: bool  # whether the last layer runs rows that are not read, too

    @property
    def top_k(self) -> list[int]:
        """Experts per token in each layer, 0 in a dense one."""
        ...

    @property
    def max_collectives(self) -> int:
        """Upper bound on the collectives of a step that the phase clock records."""
        ...

    def set_attention(self, backend: AttentionBackend) -> None:
        """Set the kernels that attend over the cache."""
        ...

    def set_telemetry(self, telemetry: Telemetry) -> None:
        """Set where the model and its layers record their measurements."""
        ...

    def finalize_weights(self, on_progress: Callable[[], None] = ...) -> None:
        """Rearrange the loaded weights, in place, for the kernels."""
        ...

    def __call__(
        self,
        step: StepTensors,
        kv: KVCache,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states of the rows that are read; collective over EP and TP."""
        ...

    def steps(
        self,
        step: StepTensors,
        kv: KVCache,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
    ) -> Steps[torch.Tensor]:
        """Return the generator form of a call."""
        ...

    def splits_batch(self, group_tokens: int) -> bool:
        """Return whether a step is to run as two micro-batches."""
        ...

    def forward_two_batch(
        self, batches: tuple[StepTensors, StepTensors], kv: KVCache, group: GroupTokens
    ) -> torch.Tensor:
        """Run a step as two micro-batches."""
        ...

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [S, V] of final hidden states."""
        ...

    def weight_slots(self, checkpoint: Collection[str] = ...) -> Iterable[WeightSlot]:
        """Return a slot for every checkpoint tensor that this rank needs."""
        ...

    def ignored_weights(self, checkpoint: Collection[str] = ...) -> tuple[str, ...]:
        """Return regular expressions of checkpoint tensors that no rank needs."""
        ...
