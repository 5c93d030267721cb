"""Settings: those of this engine that transformers' modules do not honour."""

from __future__ import annotations

from engine.config import Config
from engine.distributed.groups import Topology


def check_settings(config: Config, topology: Topology) -> None:
    """Check the settings that transformers' modules do not honour.

    Raises:
        ValueError: naming the setting.
    """
    if topology.tensor.size > 1:
        raise ValueError(
            f"parallel.tensor = {topology.tensor.size}: must be 1 where transformers builds the "
            "model (model.implementation), whose attention is not shared over ranks"
        )
    if config.moe.overlap.two_batch:
        raise ValueError(
            "moe.overlap.two_batch = True: must be false where transformers builds the model "
            "(model.implementation), whose layers run a step as a whole; use moe.overlap.chunks"
        )
    if config.moe.shared_expert == "balanced":
        raise ValueError(
            "moe.shared_expert = balanced: must be replicated where transformers builds the model "
            "(model.implementation), which runs shared experts itself"
        )
