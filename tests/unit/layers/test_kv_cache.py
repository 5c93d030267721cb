"""The paged cache's tensors. Run: python -m pytest tests/unit/layers/test_kv_cache.py."""

from __future__ import annotations

import torch

from engine.layers.kv_cache import KVCache, KVSpec, StateSpec

CPU = torch.device("cpu")


def allocated(cache: KVCache) -> int:
    tensors = [*cache.keys, *cache.values]
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_bytes_per_block_is_what_a_block_really_takes():
    for latent in (False, True):
        spec = KVSpec(num_layers=3, num_kv_heads=2, key_dim=24, value_dim=16, latent=latent)
        cache = KVCache(spec, 5, 4, CPU, torch.bfloat16)
        assert allocated(cache) == 5 * spec.bytes_per_block(4, torch.bfloat16)


def test_layers_with_states_have_them_in_the_place_of_keys_and_values():
    state = StateSpec(conv_shape=(3, 10), delta_shape=(2, 4, 5), conv_dtype=torch.bfloat16)
    spec = KVSpec(num_layers=1, num_kv_heads=2, key_dim=8, value_dim=6, states=(state, None, state))
    cache = KVCache(spec, 5, 4, CPU, torch.bfloat16, num_sequences=7)
    shapes = [(5, 2, 4, 8), (5, 2, 4, 6)]
    of_state = [(7, 3, 10), (7, 2, 4, 5)]
    found = [
        [tuple(keys.shape), tuple(values.shape)]
        for keys, values in zip(cache.keys, cache.values, strict=True)
    ]
    assert found == [of_state, shapes, of_state]
    assert cache.keys[0].dtype == torch.bfloat16 and cache.values[0].dtype == torch.float32
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))
    assert spec.has_states and spec.state_bytes == 2 * (3 * 10 * 2 + 2 * 4 * 5 * 4)
    assert allocated(cache) == 5 * spec.bytes_per_block(4, torch.bfloat16) + 7 * spec.state_bytes
    without = KVSpec(num_layers=1, num_kv_heads=2, key_dim=8, value_dim=6)
    assert not without.has_states and without.state_bytes == 0


def test_a_convolution_of_one_tap_has_an_empty_state():
    state = StateSpec(conv_shape=(0, 10), delta_shape=(2, 4, 5), conv_dtype=torch.float32)
    spec = KVSpec(num_layers=0, num_kv_heads=1, key_dim=8, value_dim=8, states=(state,))
    assert KVCache(spec, 1, 4, CPU, torch.float32, num_sequences=2).keys[0].shape == (2, 0, 10)


def test_a_latent_value_is_the_head_of_its_key():
    spec = KVSpec(num_layers=1, num_kv_heads=1, key_dim=6, value_dim=4, latent=True)
    cache = KVCache(spec, 2, 4, CPU, torch.float32)
    cache.keys[0][1, 0, 2] = torch.arange(6.0)
    assert cache.values[0][1, 0, 2].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_cache_starts_as_zeros_and_takes_memory_only_where_it_is_written():
    spec = KVSpec(num_layers=2, num_kv_heads=1, key_dim=64, value_dim=64)
    before = resident_bytes()
    cache = KVCache(spec, 16384, 16, CPU, torch.float32)
    assert resident_bytes() - before < allocated(cache) / 10
    assert not cache.keys[1][123].any()
    cache.values[0][5, 0, 1] = 1.0
    assert cache.values[0].sum() == 64


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_the_scratch_block_and_row_of_states_are_behind_all_others():
    state = StateSpec(conv_shape=(3, 10), delta_shape=(2, 4, 5), conv_dtype=torch.bfloat16)
    spec = KVSpec(num_layers=1, num_kv_heads=2, key_dim=8, value_dim=6, states=(None, state))
    cache = KVCache(spec, 5, 4, CPU, torch.bfloat16, num_sequences=7, has_scratch=True)
    assert cache.num_blocks == 5 and cache.scratch_slot == 20 and cache.scratch_state == 7
    assert cache.keys[0].shape[0] == 6 and cache.keys[1].shape[0] == 8
    without = KVCache(spec, 5, 4, CPU, torch.bfloat16, num_sequences=7)
    assert without.scratch_slot is None and without.scratch_state is None
    plain = KVCache(
        KVSpec(num_layers=1, num_kv_heads=1, key_dim=2, value_dim=2),
        3,
        4,
        CPU,
        torch.float32,
        has_scratch=True,
    )
    assert plain.scratch_slot == 12 and plain.scratch_state is None
