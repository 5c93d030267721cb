"""What moe.dispatch.transport means for a layer, and the words in which it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.loader import config_from_tree
from engine.distributed.groups import Group
from engine.moe.dispatch.transports import choice
from engine.moe.dispatch.transports.choice import TransportPool, settings_obstacle
from engine.moe.dispatch.transports.transport import Setup


def _setup(device: str = "cuda", size: int = 2) -> Setup:
    handle: Any = None
    return Setup(
        group=Group(0, size, tuple(range(size)), handle),
        device=torch.device(device),
        dtype=torch.bfloat16,
        width=64,
        first_experts=(0, 3, 8)[: size + 1],
        top_k=2,
    )


def _moe(transport: str, **more: Any) -> Any:
    tree: dict[str, Any] = {"dispatch": {"transport": transport}, **more}
    return config_from_tree({"model": {"path": "unused"}, "moe": tree}).moe


def _get(transport: str, setup: Setup, **facts: Any) -> Any:
    asked = {"experts": "grouped_mm", "takes_device_counts": True, "has_copies": False, **facts}
    return TransportPool().get(setup, _moe(transport), **asked)


@pytest.mark.parametrize("name", ["auto", "nccl"])
def test_auto_and_nccl_have_counts_on_the_host(name: str) -> None:
    assert _get(name, _setup()) is None


def test_one_rank_needs_no_transport() -> None:
    assert _get("symmetric", _setup(size=1)) is None


@pytest.mark.parametrize("name", ["symmetric", "deepep", "te_ep"])
def test_the_cpu_is_refused_by_name_and_device(name: str) -> None:
    with pytest.raises(ValueError, match=f"transport = '{name}': .*runtime.device is cpu; set "):
        _get(name, _setup("cpu"))


def test_experts_with_counts_on_the_host_are_refused_by_their_name() -> None:
    with pytest.raises(ValueError, match=r"moe\.experts\.backend: te\) take their counts on the"):
        _get("symmetric", _setup(), experts="te", takes_device_counts=False)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"overlap": {"chunks": 2}}, "overlap.chunks = 2"),
        ({"overlap": {"two_batch": True}}, "two_batch"),
        ({"capacity": {"policy": "expanded_drop"}}, "expanded_drop"),
        ({"shared_expert": "balanced"}, "shared_expert"),
    ],
)
def test_settings_that_need_counts_on_the_host_are_named(
    settings: dict[str, Any], word: str
) -> None:
    if "shared_expert" in settings:
        settings = {**settings, "dispatch": {"partial_sums": True}}
        moe = config_from_tree({"model": {"path": "unused"}, "moe": settings}).moe
    else:
        moe = _moe("symmetric", **settings)
    assert word in (settings_obstacle(moe) or "")
    assert settings_obstacle(_moe("symmetric")) is None


def test_copies_are_refused() -> None:
    assert "copies" in (settings_obstacle(_moe("symmetric"), has_copies=True) or "")


def test_the_layers_of_a_model_share_one_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Setup] = []

    class Module:
        """A transport's module."""

        @staticmethod
        def obstacle(setup: Setup, config: Any) -> str | None:
            """Find none."""
            return None

        @staticmethod
        def make(setup: Setup) -> Any:
            """Make a transport."""
            made.append(setup)
            return object()

    monkeypatch.setattr(choice, "_module", lambda name: Module)
    pool = TransportPool()
    facts = {"experts": "grouped_mm", "takes_device_counts": True, "has_copies": False}
    first, second = (pool.get(_setup(), _moe("symmetric"), **facts) for _ in range(2))
    assert first is second
    assert len(made) == 1
    assert pool.transports == [first]


def test_setups_count_the_experts_of_a_rank_and_of_the_largest() -> None:
    assert (_setup().num_local, _setup().most_local) == (3, 5)
