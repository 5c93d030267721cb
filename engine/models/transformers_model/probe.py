"""Probe: what a model of transformers asks of this engine, found by running it without memory.

The model is built on the meta device and run once on two tokens. Its attention and its experts are
replaced by recorders, so that every call of a layer is seen: heads, scale, mask, experts, top-k.
What cannot be served is refused here, by name, before any weight is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from engine.models.transformers_model.block_record import BlockRecords
from engine.models.transformers_model.experts_form import NotServed, shape_of
from engine.models.transformers_model.fixed_rotary import fix_lengths
from engine.models.transformers_model.layer_calls import AttentionCall, ExpertsCall, Probed
from engine.models.transformers_model.mask_window import window_of
from engine.models.transformers_model.plug_in import PROBE, MaskRule, plug_in
from engine.models.transformers_model.text_model import text_class
from engine.moe.stacked_experts import StackedExperts, is_stacked

_LONGEST = 2**17  # positions at which a mask is looked at
_TOKENS = 2  # of the run
_SERVED_LAYERS = ("full_attention", "sliding_attention")
# Arguments of an attention call that are served, or say nothing about its result.
_SERVED = ("dropout", "sliding_window", "position_ids", "s_aux", "is_causal", "cache_position")


def build_on_meta(hf_config: Any, dtype: torch.dtype, attention: str) -> Any:
    """Return transformers' model of a configuration without memory; attention: its registered name.

    Raises:
        NotServed: transformers has no causal language model for it.
    """
    plug_in()
    config = copy.deepcopy(hf_config)
    config.use_cache = False
    with torch.device("meta"):
        model = class_of(config)._from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def class_of(hf_config: Any) -> Any:
    """Return transformers' class of causal language models for a configuration.

    Raises:
        NotServed: there is none.
    """
    import transformers

    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(hf_config) in mapping:
        return mapping[type(hf_config)]
    for name in getattr(hf_config, "architectures", None) or ():  # not all are in the mapping
        found = getattr(transformers, name, None) if name.endswith("ForCausalLM") else None
        if getattr(found, "config_class", None) is type(hf_config):
            return found
    if (found := text_class(hf_config)) is not None:
        return found
    raise NotServed(f"transformers {transformers.__version__} has no causal language model for it")


def probe(hf_config: Any) -> Probed:
    """Run a configuration's model without memory and return what it asks for.

    Raises:
        NotServed: naming what of it this engine cannot serve.
    """
    _check_config(hf_config)
    model = build_on_meta(hf_config, torch.float32, PROBE)
    recorder = _Recorder(model, longest_of(hf_config))
    if not recorder.has_experts:
        raise NotServed(
            f"transformers' {type(model).__name__} has no experts that this engine can replace"
        )
    body = getattr(model, model.base_model_prefix)
    ids_1T = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    try:
        fix_lengths(model, ids_1T.shape[1], ids_1T.device, torch.float32)
        # A mask, or transformers would look for packed sequences, which reads the positions.
        with torch.no_grad():
            body(
                input_ids=ids_1T,
                position_ids=ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                use_cache=False,
            )
    except NotServed:
        raise
    except Exception as error:
        raise NotServed(
            f"transformers' {type(model).__name__} does not run on flattened tokens without a "
            f"cache of its own: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return recorder.result()


def longest_of(hf_config: Any) -> int:
    """Return the positions at which masks are looked at."""
    return max(8, min(_LONGEST, getattr(hf_config, "max_position_embeddings", None) or _LONGEST))


def _check_config(hf_config: Any) -> None:
    """Check what a configuration says before anything is built.

    Raises:
        NotServed: naming the field.
    """
    if getattr(hf_config, "is_encoder_decoder", False):
        raise NotServed("is_encoder_decoder = true in config.json: encoders are not served")
    if hf_config.get_text_config() is not hf_config:
        parts = ", ".join(sorted(hf_config.sub_configs))
        raise NotServed(
            f"config.json has the parts {parts}: encoders of images and sound are not served, nor "
            "is a language model as a part of such a model"
        )
    kinds = set(getattr(hf_config, "layer_types", None) or ()) - set(_SERVED_LAYERS)
    if kinds:
        raise NotServed(
            f"layer_types in config.json: layers of the kinds {', '.join(sorted(map(str, kinds)))} "
            f"are not served, only {' and '.join(_SERVED_LAYERS)}"
        )


class _Recorder:
    """Records the calls of a model on the meta device."""

    def __init__(self, model: Any, longest: int) -> None:
        self._model, self._longest = model, longest
        self._attention: dict[int, AttentionCall] = {}
        self._experts: list[ExpertsCall] = []
        self._windows: dict[int, int | None] = {}  # by id of a mask's function
        self._blocks = BlockRecords(model, _TOKENS)
        self.has_experts = False  # in the experts interface
        for path, module in list(model.named_modules()):
            module.lockstep_attention = self._at(path)
            if is_stacked(module):
                self.has_experts = True
                shape = shape_of(path, module)
                _set_module(model, path, _Recording(path, shape, self._called))
                self._blocks.add(path, shape.num_experts)

    def _at(self, path: str) -> Callable[..., torch.Tensor]:
        return lambda *arguments: self._attends(path, *arguments)

    def _attends(
        self,
        path: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scaling: float | None,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        layer = layer_of(path)
        if layer in self._attention:
            raise NotServed(f"layer {layer} attends twice, and has one cache of keys and values")
        for name, given in arguments.items():
            if name not in _SERVED and given is not None and given is not False:
                raise NotServed(f"layer {layer} attends with {name}, which is not served")
        if arguments.get("is_causal") is False:
            raise NotServed(f"layer {layer} attends to later tokens, which is not served")
        if scaling is None:
            raise NotServed(f"layer {layer} attends without a scale")
        if key.shape[2] != query.shape[2]:
            raise NotServed(f"layer {layer} attends to keys of other tokens than the step's")
        self._attention[layer] = AttentionCall(
            path=path,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            window=self._window(layer, mask),
        )
        return value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])

    def _window(self, layer: int, mask: Any) -> int | None:
        if mask is None:
            return None
        if not isinstance(mask, MaskRule):
            raise NotServed(f"layer {layer} attends with a mask of its own, which is not served")
        try:
            return window_of(mask.function, self._longest)
        except Exception as error:
            raise NotServed(
                f"layer {layer} attends with a mask that is neither causal nor a sliding window, "
                "which is not served"
            ) from error

    def _called(
        self, path: str, shape: StackedExperts, x: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        layer = layer_of(path)
        if any(call.layer == layer for call in self._experts):
            raise NotServed(f"layer {layer} calls experts twice")
        if x.dim() != 2 or ids.dim() != 2 or ids.is_floating_point():
            raise NotServed(
                f"{path} does not take tokens [T, D], experts and weights [T, top-k] in this order"
            )
        call = ExpertsCall(path=path, layer=layer, top_k=ids.shape[1], shape=shape)
        self._experts.append(call)
        return torch.empty_like(x)

    def result(self) -> Probed:
        """Return what was recorded.

        Raises:
            NotServed: a layer neither attends nor has a cache here, or none has experts.
        """
        model, config = self._model, self._model.config
        name = type(model).__name__
        if not self._experts:
            raise NotServed(f"transformers' {name} has no experts that this engine can replace")
        layers = config.num_hidden_layers
        if missing := sorted(set(range(layers)) - set(self._attention)):
            raise NotServed(
                f"layers {', '.join(map(str, missing[:10]))} of transformers' {name} do not attend "
                "through its attention registry: recurrent and convolution states, and sparse "
                "attention, are not served"
            )
        calls = [self._attention[layer] for layer in range(layers)]
        if len({(call.key_dim, call.value_dim) for call in calls}) > 1:
            raise NotServed(f"layers of transformers' {name} have keys and values of other widths")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        return Probed(
            attention=tuple(calls),
            experts=self._with_scores(),
            hidden=embedding.weight.shape[1],
            vocab_size=embedding.weight.shape[0],
            tied_embeddings=head is not None and head.weight is embedding.weight,
        )

    def _with_scores(self) -> tuple[ExpertsCall, ...]:
        return tuple(
            replace(call, scores=self._blocks.scores(call.path, call.top_k))
            for call in self._experts
        )


class _Recording(nn.Module):
    """In place of experts: records its call."""

    def __init__(
        self, path: str, shape: StackedExperts, called: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        self._path, self._shape, self._called = path, shape, called

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self._called(self._path, self._shape, hidden_states, top_k_index)


def layer_of(path: str) -> int:
    """Return the layer that a module's path names."""
    match = re.search(r"\.(\d+)\.", path)
    if match is None:
        raise NotServed(f"{path} attends or has experts, and is in no layer")
    return int(match[1])


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
