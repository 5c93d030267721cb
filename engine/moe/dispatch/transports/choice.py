"""Choice of the transport: what moe.dispatch.transport means for a layer, and why it is refused.

`auto` is `nccl` (on the CPU gloo): no other transport has been executed on a GPU yet.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from engine.config import MoEConfig
from engine.moe.dispatch.transports.transport import BorrowsGroup, DeviceTransport, Setup

# Each has `obstacle` and `make`: see `transport.py`.
_MODULES = {
    "symmetric": "engine.moe.dispatch.transports.symmetric",
    "deepep": "engine.moe.dispatch.transports.deep_ep",
    "te_ep": "engine.moe.dispatch.transports.te_ep",
}


class TransportPool:
    """The transports of one model, whose layers share them where their setups are equal."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, Setup], DeviceTransport] = {}

    @property
    def transports(self) -> list[DeviceTransport]:
        """All of them, in the order in which layers asked for them."""
        return list(self._made.values())

    def release(self) -> None:
        """End the use of process groups that transports hold, before these are destroyed."""
        for each in self._made.values():
            if isinstance(each, BorrowsGroup):
                each.release()

    def get(
        self,
        setup: Setup,
        config: MoEConfig,
        *,
        experts: str,
        takes_device_counts: bool,
        has_copies: bool,
    ) -> DeviceTransport | None:
        """Return the transport of a layer; None: `nccl`.

        Args:
            setup: of the layer.
            config: moe.
            experts: the backend that runs the experts.
            takes_device_counts: whether it reads their counts on the device.
            has_copies: whether ranks hold copies of other ranks' experts.

        Raises:
            ValueError: moe.dispatch.transport cannot be had here; the text says why.
        """
        name = config.dispatch.transport
        if name in ("auto", "nccl") or setup.group.size == 1:
            return None
        why = setup_obstacle(setup) or settings_obstacle(config, has_copies)
        if why is None and not takes_device_counts:
            why = (
                f"the experts (moe.experts.backend: {experts}) take their counts on the host; "
                "only grouped_mm in the model's precision reads them on the device"
            )
        module = None if why is not None else _module(name)
        if why is None:
            why = "it is not part of this release" if module is None else None
        if module is not None:
            why = module.obstacle(setup, config)
        if why is not None:
            raise ValueError(
                f"moe.dispatch.transport = {name!r}: {why}; set moe.dispatch.transport to auto"
            )
        assert module is not None
        if (name, setup) not in self._made:
            self._made[name, setup] = module.make(setup)
        return self._made[name, setup]


def setup_obstacle(setup: Setup) -> str | None:
    """Return why a device's layer has counts on the host alone; None: it need not."""
    if setup.device.type != "cuda":
        return f"it runs on CUDA devices alone, and runtime.device is {setup.device.type}"
    return None


def settings_obstacle(config: MoEConfig, has_copies: bool = False) -> str | None:
    """Return which setting needs counts on the host; None: none does. Pure."""
    if has_copies:
        return "moe.placement has copies of experts, whose rows are split by counts on the host"
    if config.shared_expert == "balanced":
        return "moe.shared_expert = 'balanced' moves rows by counts on the host"
    if config.overlap.chunks != 1:
        return f"moe.overlap.chunks = {config.overlap.chunks!r} cuts rows by counts on the host"
    if config.overlap.two_batch:
        return "moe.overlap.two_batch = true keeps two calls in flight, and it has buffers for one"
    if config.capacity.policy == "expanded_drop":
        return "moe.capacity.policy = 'expanded_drop' adds rows after the counts are known"
    return None


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name != _MODULES[name]:
            raise
        return None
