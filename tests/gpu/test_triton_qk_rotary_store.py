"""qk_rotary_store in Triton against the torch reference.

On a CUDA device, else in Triton's interpreter.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from engine.ops.qk_rotary_store import QKRule, qk_rotary_store_reference
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}
PLAIN = QKRule("none")

pytestmark = kernel


@dataclass
class Case:
    """A step of `tokens` tokens: three views of one projection, and a cache with room."""

    tokens: int = 5
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    rotary: int | None = None  # None: the whole head
    dtype: torch.dtype = torch.float32
    block_size: int = 3
    rule: QKRule = PLAIN

    def inputs(self) -> list:
        q_width, kv_width = self.heads * self.dim, self.kv_heads * self.dim
        qkv = torch.randn(self.tokens, q_width + 2 * kv_width + 8).to(self.dtype) * 2
        q, k, v, _ = qkv.split([q_width, kv_width, kv_width, 8], dim=1)
        whole = self.rule.norm == "projection"
        widths = (q_width, kv_width) if whole else (self.dim, self.dim)
        norms = [(1 + 0.1 * torch.randn(width)).to(self.dtype) for width in widths]
        if self.rule.norm == "none":
            norms = [None, None]
        angle = torch.rand(self.tokens, (self.rotary or self.dim) // 2).repeat(1, 2) * 6
        angles = [angle.cos().to(self.dtype), angle.sin().to(self.dtype)]
        blocks = -(-self.tokens // self.block_size) + 1
        shape = (blocks, self.kv_heads, self.block_size, self.dim)
        caches = [torch.full(shape, 7.0, dtype=self.dtype) for _ in range(2)]
        slots = torch.randperm(blocks * self.block_size)[: self.tokens]
        return [q, k, v, *norms, *angles, *caches, slots, self.rule]


def compare(inputs: list, dtype: torch.dtype) -> None:
    from engine.ops.gpu.qk_rotary_store import qk_rotary_store_triton

    # To keep strides, only what is not on the device is copied; caches are written, so always.
    given = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
    given[7:9] = [x.to(DEVICE, copy=True) for x in inputs[7:9]]
    before = [x.clone() for x in given[:3]]
    got = qk_rotary_store_triton(*given)
    assert all(torch.equal(a, b) for a, b in zip(given[:3], before, strict=True))
    # The reference in float32: it rounds once per operation and may overwrite q and k.
    exact = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    exact = [x.float() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for x in exact]
    expected = qk_rotary_store_reference(*exact)
    for mine, theirs in ((got, expected), (given[7], exact[7]), (given[8], exact[8])):
        assert mine.dtype == dtype
        bound = BOUNDS[dtype]
        torch.testing.assert_close(mine.cpu().float(), theirs, rtol=bound, atol=bound)


RULES = {
    "none": PLAIN,
    "head": QKRule("head", 1e-5),
    "projection": QKRule("projection", 1e-5),
    "clip": QKRule("none", clip=1.0),
    "projection, clip": QKRule("projection", 1e-5, clip=0.75),
    "clip, head": QKRule("head", 1e-5, clip=1.5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_matches_the_reference(rule, dtype):
    compare(Case(rule=RULES[rule], dtype=dtype).inputs(), dtype)


@pytest.mark.parametrize("norm", ["none", "head", "projection"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary"),
    [(1, 1, 2, None), (3, 1, 6, None), (7, 7, 24, None), (5, 1, 80, 32), (2, 2, 10, 6)],
)
def test_odd_heads_and_partial_rotations_match_the_reference(heads, kv_heads, dim, rotary, norm):
    case = Case(7, heads, kv_heads, dim, rotary, rule=QKRule(norm))
    compare(case.inputs(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "norm"),
    [(32, 8, 128, "none"), (32, 4, 128, "head"), (16, 16, 128, "projection"), (64, 8, 128, "none"),
     (32, 8, 256, "projection")],
)  # fmt: skip
def test_widths_of_real_models_match_the_reference(heads, kv_heads, dim, norm, dtype):
    case = Case(2, heads, kv_heads, dim, dtype=dtype, block_size=16, rule=QKRule(norm))
    compare(case.inputs(), dtype)


@pytest.mark.parametrize("norm", ["none", "head", "projection"])
def test_no_token_writes_nothing(norm):
    from engine.ops.gpu.qk_rotary_store import qk_rotary_store_triton

    inputs = Case(0, rule=QKRule(norm)).inputs()
    given = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
    assert qk_rotary_store_triton(*given).shape == (0, 4, 16)
    assert bool((given[7] == 7).all()) and bool((given[8] == 7).all())


def test_caches_and_angles_may_be_strided_views():
    inputs = Case(6, dim=8).inputs()
    inputs[5:7] = [x.repeat(1, 2)[:, 4:12] for x in inputs[5:7]]
    inputs[5:7] = [torch.stack((x, x), 1)[:, 0] for x in inputs[5:7]]
    inputs[7:9] = list(torch.cat((inputs[7], inputs[8]), dim=3).split([8, 8], dim=3))
    compare(inputs, torch.float32)


def test_a_nan_stays_in_its_head_and_passes_the_bound():
    from engine.ops.gpu.qk_rotary_store import qk_rotary_store_triton

    case = replace(Case(2), rule=QKRule("head", clip=1.0))
    inputs = case.inputs()
    inputs[0][1, 16] = float("nan")  # of head 1
    inputs[2][0, 3] = float("nan")
    given = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]
    out = qk_rotary_store_triton(*given).cpu()
    assert out[1, 1].isnan().all() and int(out.isnan().sum()) == 16
    assert int(given[7].isnan().sum()) == 0 and int(given[8].isnan().sum()) == 1
