"""What the tests on emulated CUDA share: the device guard and small random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.emulated.guard import compile_guard
from tools.make_random_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled device guard."""
    return compile_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns a checkpoint of a family."""
    made: dict[str, Path] = {}

    def path_of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_checkpoint(family, made[family], overrides={"vocab_size": 97})
        return made[family]

    return path_of
