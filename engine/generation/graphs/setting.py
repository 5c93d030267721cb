"""Graphs setting: whether decode graphs are captured, by runtime.graphs and what the job asks for.

Known before anything is captured, and the same on every rank.
"""

from __future__ import annotations

import torch

from engine.config import Config
from engine.generation.moe_step import ExchangeWay
from engine.layers.attention_backends.backend import AttentionBackend
from engine.models.language_model import LanguageModel


def graphs_obstacle(
    config: Config, model: LanguageModel, device: torch.device, every: int
) -> str | None:
    """Return why decode steps run without CUDA graphs, in words; None: graphs are captured.

    Args:
        config: of the job.
        model: with its weights.
        device: of this rank.
        every: steps from one complete one to the next (`builder.profiler_every`).
    """
    if device.type != "cuda":
        return f"the model runs on {device.type}"
    if config.runtime.graphs == "off":
        return "runtime.graphs is off"
    if model.runs_last_whole:  # not this engine's own decoder
        return "transformers builds the model (model.implementation), whose code may wait"
    if _plans_by_setting(config.attention.backend, model.attention_backend):
        return (
            f"attention.backend = {config.attention.backend!r} plans every step on the host; auto "
            "and triton let graphs attend by triton"
        )
    if config.profiler.enabled and every == 1:
        return "profiler.every is 1, so all steps have all marks, which a replay has not"
    if config.profiler.routing is not None:
        return "profiler.routing records what every step's routers choose"
    if config.moe.copies.replan != "off" and model.placement is not None:
        return "moe.copies.replan replaces the tables of experts that a graph would read"
    found = (layer.static.obstacle for layer in model.moe_layers)
    return next((each for each in found if each is not None), None)


def exchange_way(config: Config, *, has_graphs: bool) -> ExchangeWay:
    """Return moe.dispatch.exchange as it applies: null is auto with graphs, else counted."""
    return config.moe.dispatch.exchange or ("auto" if has_graphs else "counted")


def _plans_by_setting(setting: str, backend: AttentionBackend) -> bool:
    return setting != "auto" and backend.has_plans
