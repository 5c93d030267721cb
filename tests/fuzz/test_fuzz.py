"""About a minute of random inputs. Longer: python -m tests.fuzz --minutes 30 --seed 7"""

import pytest

from tests.fuzz.generators import GENERATORS
from tests.fuzz.runner import Base

pytestmark = pytest.mark.long

# Of each generator; a case of `lines` or `openai` has 40 lines.
NUM_CASES = {"lines": 15, "openai": 10, "config": 40, "weights": 30, "files": 20, "settings": 25}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return Base(tmp_path_factory.mktemp("fuzz") / "base")


@pytest.mark.parametrize("generator", GENERATORS)
def test_random_inputs_end_without_traceback_or_hang_and_with_a_documented_code(
    base, tmp_path, generator
):
    problems = [
        f"{generator}, seed {seed}: {problem}"
        for seed in range(NUM_CASES[generator])
        if (problem := base.problem(generator, seed, tmp_path / "case"))
    ]
    assert not problems, "\n\n".join(problems)
