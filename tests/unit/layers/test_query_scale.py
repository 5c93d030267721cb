"""Queries that grow with their position, and the tables that layers share.

Run: pytest tests/unit/layers/test_query_scale.py
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from engine.distributed.groups import Group
from engine.layers.attention import Attention, AttentionSpec, share_query_scales
from engine.layers.query_scale import QueryScale

CPU = torch.device("cpu")


def attention(scale: QueryScale | None) -> Attention:
    spec = AttentionSpec(hidden=8, num_heads=1, num_kv_heads=1, head_dim=8, query_scale=scale)
    return Attention(spec, Group(0, 1, (0,), cast(Any, None)), CPU, torch.float32)


def test_the_factor_grows_when_an_interval_is_full():
    table = QueryScale(interval=4, strength=0.1).table(13, CPU)
    steps = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    expected = [1 + 0.1 * math.log(1 + step) for step in steps]
    torch.testing.assert_close(table, torch.tensor(expected))


def test_layers_of_the_same_scale_share_a_table_and_others_have_none():
    one, other = QueryScale(interval=4, strength=0.1), QueryScale(interval=2, strength=0.1)
    layers = [attention(scale) for scale in (one, None, one, other)]
    share_query_scales(layers, 16, CPU)
    tables = [layer.query_scale_P for layer in layers]
    assert tables[0] is tables[2] and tables[1] is None
    assert tables[3] is not None and not torch.equal(tables[3], one.table(16, CPU))
