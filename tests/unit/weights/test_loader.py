"""Loading on one rank: bytes, shards, conversions, and every way a checkpoint can be wrong.

python -m pytest tests/unit/weights/test_loader.py
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import engine.weights.reader as weight_reader
from engine.weights.loader import CheckpointError, fill_dummy, load_weights
from engine.weights.safetensors_header import read_catalog, read_header
from engine.weights.slot import WeightSlot

ROOT = Path(__file__).parents[3]


def slot(name: str, target: torch.Tensor, full=None, shard=None, **others) -> WeightSlot:
    return WeightSlot(name, target, tuple(full or target.shape), shard, **others)


def save(folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors") -> Path:
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder / file


def save_sharded(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
    for file, tensors in files.items():
        save(folder, tensors, file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def error_of(folder: Path, *slots: WeightSlot, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(folder, slots, **options)
    return str(caught.value)


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_dtype_arrives_bit_for_bit(tmp_path, dtype):
    tensors = {
        "matrix": torch.randn(37, 19).to(dtype),
        "vector": torch.randn(11).to(dtype),
        "scalar": torch.tensor(2.5, dtype=dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    save(tmp_path, tensors)
    slots = [slot(name, torch.full_like(value, 7)) for name, value in tensors.items()]
    report = load_weights(tmp_path, slots)
    assert report.tensors_read == 4
    for each in slots:
        assert torch.equal(each.target, tensors[each.name])


SHARDS = {
    "rows": (slice(4, 9),),
    "columns": (slice(None), slice(3, 8)),
    "block": (slice(2, 7), slice(1, 9), slice(0, 1)),
    "one row": (slice(11, 12),),
    "no rows": (slice(5, 5),),
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [24, 4 << 20], ids=["many chunks", "one chunk"])
def test_a_shard_is_that_part_of_the_whole(tmp_path, monkeypatch, shard, dtype, chunk):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", chunk)
    whole = torch.randn(12, 10, 3)
    save(tmp_path, {"w": whole})
    target = torch.full_like(whole[shard], 7, dtype=dtype)
    load_weights(tmp_path, [slot("w", target, whole.shape, shard)])
    assert torch.equal(target, whole[shard].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_strided_destination_is_filled_and_its_neighbours_are_not(tmp_path, dtype):
    whole = torch.randn(6, 4)
    save(tmp_path, {"w": whole})
    stacked = torch.full((6, 8), 7.0, dtype=dtype)
    load_weights(tmp_path, [slot("w", stacked[:, 2:6])])
    assert torch.equal(stacked[:, 2:6], whole.to(dtype))
    assert (stacked[:, :2] == 7).all() and (stacked[:, 6:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_added_in_float32_before_rounding(tmp_path, dtype):
    source = torch.tensor([0.0, -0.75, 2**-9 + 2**-12, -1.0], dtype=torch.bfloat16)
    save(tmp_path, {"w": source})
    target = torch.zeros(3, dtype=dtype)
    shifted = slot("w", target, (4,), (slice(1, 4),), offset=1.0)
    load_weights(tmp_path, [shifted])
    assert torch.equal(target, (source[1:].float() + 1).to(dtype))
    assert target[0] == 0.25 and target[2] == 0


def test_a_parameter_that_requires_grad_is_filled(tmp_path):
    save(tmp_path, {"w": torch.ones(3, 3)})
    parameter = torch.nn.Parameter(torch.zeros(3, 3))
    load_weights(tmp_path, [slot("w", parameter)])
    assert (parameter == 1).all()


def test_sharded_files_aliases_and_ignored_names(tmp_path):
    first, second = torch.randn(5, 4), torch.randn(3)
    save_sharded(
        tmp_path,
        {
            "model-00001-of-00002.safetensors": {"a": first},
            "model-00002-of-00002.safetensors": {"old.b": second, "layers.0.inv_freq": second + 1},
        },
    )
    a, b = torch.zeros(5, 4), torch.zeros(3)
    load_weights(tmp_path, [slot("a", a), slot("b", b, aliases=("old.b",))], ignored=["inv_freq$"])
    assert torch.equal(a, first) and torch.equal(b, second)


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_tensor_is_read_as_it_is_or_turned_by_its_shape_and_refused_in_another(
    tmp_path, is_turned
):
    values = torch.arange(24.0).view(4, 2, 3)
    save(tmp_path, {"w": values.transpose(1, 2).contiguous() if is_turned else values})
    target = torch.zeros(2, 2, 3)  # of experts 1 and 2
    mine = (slice(1, 3),)
    turned = slot("w", target.transpose(1, 2), (4, 3, 2), mine)
    load_weights(tmp_path, [slot("w", target, (4, 2, 3), mine, turned=turned)])
    assert torch.equal(target, values[1:3])
    other = torch.zeros(4, 2, 4)
    message = error_of(tmp_path, slot("w", other, turned=slot("w", other.transpose(1, 2))))
    assert "wrong shape" in message and "must be [4, 2, 4]" in message


def test_one_tensor_may_fill_two_slots(tmp_path):
    whole = torch.randn(4, 4)
    save(tmp_path, {"w": whole})
    upper, lower = torch.zeros(2, 4), torch.zeros(2, 4)
    slots = [
        slot("w", upper, (4, 4), (slice(0, 2),)),
        slot("w", lower, (4, 4), (slice(2, 4),)),
    ]
    load_weights(tmp_path, slots)
    assert torch.equal(torch.cat([upper, lower]), whole)


MEASURE = """
import os, resource, sys, torch
from engine.weights.loader import WeightSlot, load_weights
folder, wanted = sys.argv[1], sys.argv[2].split(",")
shape = (1024, 2048)
slots = [WeightSlot(name, torch.ones(shape), shape) for name in wanted]

def rchar():
    return int(open("/proc/self/io").read().split()[1])

load_weights(folder, slots[:1], ignored=["."])  # all is imported, memory is warm
overhead = -rchar() + rchar()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = rchar()
report = load_weights(folder, slots, ignored=["."])
read = rchar() - before - overhead
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
print(report.bytes_read, read, grown)
"""


def test_bytes_read_are_what_the_kernel_counts_and_only_the_owned_tensors(tmp_path):
    one = 1024 * 2048 * 4
    save_sharded(
        tmp_path,
        {
            "model-1.safetensors": {f"t{i}": torch.full((1024, 2048), float(i)) for i in range(3)},
            "model-2.safetensors": {"t3": torch.zeros(1024, 2048), "t4": torch.zeros(1024, 2048)},
        },
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "t1,t3"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    reported, counted, grown = map(int, done.stdout.split())
    assert reported == counted
    headers = sum(read_header(tmp_path / f"model-{i}.safetensors")[1] for i in (1, 2))
    index = (tmp_path / "model.safetensors.index.json").stat().st_size
    assert reported == 2 * one + headers + index
    assert grown < one / 2  # straight into the destination: no second copy of a tensor


# --- What is refused ------------------------------------------------------------------------------


def test_all_disagreements_of_names_and_shapes_are_reported_at_once(tmp_path):
    save(
        tmp_path,
        {
            "model.layer.0.w": torch.ones(2, 2),
            "norm": torch.ones(3),
            "ids": torch.ones(2, dtype=torch.int32),
        },
    )
    text = error_of(
        tmp_path,
        slot("model.layers.0.w", torch.zeros(2, 2)),
        slot("norm", torch.zeros(4)),
        slot("ids", torch.zeros(2)),
    )
    assert "1 tensors are missing" in text
    assert "model.layers.0.w (the files have model.layer.0.w)" in text
    assert "belong to no part of the model" in text and "use the files it was published" in text
    assert ": model.layer.0.w in model.safetensors" in text
    assert "norm in model.safetensors is [3], must be [4]" in text
    assert "ids in model.safetensors is I32" in text


def test_a_long_list_is_counted_and_shortened(tmp_path):
    save(tmp_path, {"x": torch.ones(1)})
    text = error_of(tmp_path, *(slot(f"w{i}", torch.zeros(1)) for i in range(40)), ignored=["x"])
    assert "40 tensors are missing" in text and "w9; ..." in text and "w10" not in text


def test_nothing_is_written_when_names_disagree(tmp_path):
    save(tmp_path, {"a": torch.ones(2)})
    target = torch.zeros(2)
    error_of(tmp_path, slot("a", target), slot("b", torch.zeros(2)))
    assert (target == 0).all()


def test_float8_weights_are_refused_with_the_reason(tmp_path):
    save(tmp_path, {"w": torch.ones(2, 2).to(torch.float8_e4m3fn)})
    text = error_of(tmp_path, slot("w", torch.zeros(2, 2)))
    assert "w in model.safetensors is F8_E4M3" in text and "convert the checkpoint" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_found_at_any_position(tmp_path, dtype, value, target):
    bad = torch.zeros(3000, 50, dtype=dtype)
    bad[2999, 49] = value
    save(tmp_path, {"good": torch.ones(2), "bad": bad})
    text = error_of(
        tmp_path, slot("good", torch.zeros(2)), slot("bad", torch.zeros(bad.shape, dtype=target))
    )
    assert "bad in " in text and "model.safetensors" in text and "NaN or infinity" in text


@pytest.mark.parametrize(
    ("dtype", "target", "largest", "too_large"),
    [
        (torch.float32, torch.float16, 65519.0, 65520.0),
        (torch.bfloat16, torch.float16, 65280.0, 65536.0),
        (torch.float32, torch.bfloat16, 3.3895e38, 3.4e38),
    ],
)
def test_values_too_large_for_the_target_are_errors(tmp_path, dtype, target, largest, too_large):
    for value, fits in ((largest, True), (-largest, True), (too_large, False), (-too_large, False)):
        source = torch.tensor([0.0, value], dtype=dtype)
        assert source.to(target).isfinite().all() == fits
        save(tmp_path, {"w": source})
        into = slot("w", torch.zeros(2, dtype=target))
        if fits:
            load_weights(tmp_path, [into])
        else:
            assert f"values too large for {target}" in error_of(tmp_path, into)


def test_the_largest_finite_values_of_each_dtype_are_fine(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        edge = torch.tensor([info.max, info.min, info.tiny, -0.0], dtype=dtype)
        save(tmp_path, {"w": edge})
        target = torch.ones(4, dtype=dtype)
        load_weights(tmp_path, [slot("w", target)])
        assert torch.equal(target, edge)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_float64_is_read_as_torch_converts_it_and_too_large_values_are_errors(tmp_path, target):
    source = torch.randn(37, 19, dtype=torch.float64)
    save(tmp_path, {"w": source})
    into = slot("w", torch.zeros(37, 5, dtype=target), (37, 19), (slice(None), slice(3, 8)))
    load_weights(tmp_path, [into])
    assert torch.equal(into.target, source[:, 3:8].to(target))
    into = slot("w", torch.zeros(2, dtype=target))
    largest = torch.finfo(target).max
    step = largest * torch.finfo(target).eps / 4  # to half way between it and infinity
    for value in (largest, largest + 0.99 * step, largest + step, largest + 1.01 * step, 1e300):
        values = torch.tensor([0.0, -value], dtype=torch.float64)
        save(tmp_path, {"w": values})
        if values.to(target).isfinite().all():
            load_weights(tmp_path, [into])
        else:
            assert f"values too large for {target}" in error_of(tmp_path, into)
    save(tmp_path, {"w": torch.tensor([0.0, float("nan")], dtype=torch.float64)})
    assert "NaN or infinity" in error_of(tmp_path, into)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (
            "F8_E4M3",
            "quantised to 8 bits, and no quantization_config in config.json says how to read them",
        ),
        ("F8_E5M2", "quantised to 8 bits"),
        ("F4", "quantised to 4 bits"),
        ("I8", "integers, as in checkpoints quantised by GPTQ, AWQ or bitsandbytes"),
        ("U8", "integers, as in checkpoints quantised by GPTQ, AWQ or bitsandbytes"),
        ("I32", "integers, as in checkpoints quantised by GPTQ, AWQ or bitsandbytes"),
        ("I64", "integers, which no weights are"),
        ("U16", "integers, which no weights are"),
        ("BOOL", "true or false, which no weights are"),
        ("C64", "complex numbers"),
        ("X9", "of the unknown dtype X9"),
    ],
)
def test_a_dtype_that_is_not_read_is_said_for_what_it_is(tmp_path, dtype, text):
    bits = {"I64": 64, "C64": 64, "I32": 32, "U16": 16, "F4": 4}.get(dtype, 8)
    num_bytes = 4 * bits // 8
    header = {"w": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, num_bytes]}}
    write_raw(tmp_path / "model.safetensors", header, bytes(num_bytes))
    message = error_of(tmp_path, slot("w", torch.zeros(2, 2)))
    assert f"1 tensors are {text}" in message
    assert f"w in model.safetensors is {dtype}" in message
    assert "quantised" in message or dtype in ("I64", "U16", "BOOL", "C64", "X9")


def test_a_head_or_embedding_that_is_missing_alone_names_the_setting(tmp_path):
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    slots = [slot(name, torch.zeros(2, 2)) for name in (head, embedding)]
    for lacking, there in ((head, embedding), (embedding, head)):
        save(tmp_path, {there: torch.ones(2, 2)})
        text = error_of(tmp_path, *slots)
        assert f"For {lacking}: if head and embedding are the same tensor, set tie_word" in text
    save(tmp_path, {"w": torch.ones(1)})
    assert "tie_word_embeddings" not in error_of(tmp_path, *slots)


def test_pickled_checkpoints_are_refused_with_the_way_to_convert(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    text = error_of(tmp_path, slot("w", torch.zeros(1)))
    assert "pytorch_model.bin" in text and "refused" in text and "save_pretrained" in text


def test_folders_without_a_checkpoint_are_refused_with_what_to_do(tmp_path):
    assert "no such folder" in error_of(tmp_path / "nowhere", slot("w", torch.zeros(1)))
    assert "model.load_format=dummy" in error_of(tmp_path, slot("w", torch.zeros(1)))
    save(tmp_path, {"w": torch.ones(1)}, "consolidated.safetensors")
    text = error_of(tmp_path, slot("w", torch.zeros(1)))
    assert "though consolidated.safetensors: weights in the format of" in text


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = save(tmp_path, {"w": torch.ones(64, 64)})
    path.write_bytes(path.read_bytes()[:keep])
    text = error_of(tmp_path, slot("w", torch.zeros(64, 64)))
    assert str(path) in text and "truncated" in text


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path):
    path = save(tmp_path, {"w": torch.ones(64, 64)})
    entry = read_catalog(tmp_path).entries["w"]
    path.write_bytes(path.read_bytes()[:1000])
    job = weight_reader.ReadJob("w", entry, torch.zeros(64, 64), ((0, 64), (0, 64)))
    with pytest.raises(CheckpointError, match=r"w in .*model.safetensors: the file became shorter"):
        weight_reader.read_all([job], None)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    text = error_of(tmp_path, slot("w", torch.zeros(1)))
    assert "model.safetensors is a folder and must be a file" in text


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in error_of(tmp_path, slot("w", torch.zeros(1)))


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    w = slot("w", torch.zeros(1))
    save(tmp_path, {"v": torch.ones(1)}, "a.safetensors")
    for weight_map, match in (
        ({"w": "b.safetensors"}, "1 files that are not there: b.safetensors"),
        ({"w": "a.safetensors"}, "places 'w' in a.safetensors, which does not hold it"),
        ({"w": "../a.safetensors"}, "outside of the folder: weight_map must have names of files"),
        ({"w": "sub/a.safetensors"}, "places tensor 'w' in 'sub/a.safetensors', in a subfolder"),
        ({"w": "/a/a.safetensors"}, "'/a/a.safetensors', an absolute path"),
        ({"w": "sub/"}, "in a subfolder"),
        ({"w": ".."}, "no file name"),
        ({"w": ""}, "no file name"),
        ({"w": 3}, "must map tensor names"),
        ([], "must map tensor names"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert match in error_of(tmp_path, w)
    index.write_text("{")
    assert "the index is not valid JSON" in error_of(tmp_path, w)
    index.write_bytes(b"\xff")
    assert f"{index} is not UTF-8 (byte 0 is 0xff)" in error_of(tmp_path, w)
    index.write_text("")
    assert f"{index} is empty" in error_of(tmp_path, w)
    index.write_text("[]")
    assert "not a JSON object" in error_of(tmp_path, w)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"w": GOOD | {"data_offsets": [0, 12]}}, bytes(12), "takes 8 bytes"),
        ({"w": GOOD | {"data_offsets": [8, 0]}}, bytes(8), "damaged header item"),
        ({"w": GOOD | {"shape": [-2]}}, bytes(8), "damaged header item"),
        ({"w": GOOD | {"shape": [True, 2]}}, bytes(8), "damaged header item"),
        ({"w": [1, 2]}, bytes(8), "damaged header item"),
        ({"w": GOOD, "v": GOOD}, bytes(8), "overlaps the tensor before it"),
        ({"w": GOOD | {"data_offsets": [4, 12]}}, bytes(12), "follows a gap"),
        ({"w": GOOD}, bytes(9), "1 bytes after its last tensor"),
        ({"w": GOOD}, bytes(4), "truncated: tensor 'w' ends"),
        (b'{"w": 1, "w": 2}', b"", "a name is given twice"),
        (b'{"w": ', b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
    ],
)
def test_damaged_headers_are_refused_by_name(tmp_path, header, data, match):
    write_raw(tmp_path / "model.safetensors", header, data)
    text = error_of(tmp_path, slot("w", torch.zeros(2)))
    assert match in text and "model.safetensors" in text and "download or copy it again" in text


def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, b"{}", length=1 << 40)
    os.truncate(path, (1 << 40) + 100)  # sparse: takes no room
    assert "limit 100000000" in error_of(tmp_path, slot("w", torch.zeros(1)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F99"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
    },
)


@given(header=st.dictionaries(st.sampled_from(["w", "v", "__metadata__"]), ITEM | JSON))
def test_any_header_is_read_or_refused_as_a_checkpoint_error(tmp_path_factory, header):
    folder = tmp_path_factory.mktemp("any")
    write_raw(folder / "model.safetensors", header, bytes(32))
    try:
        load_weights(folder, [slot("w", torch.zeros(2))], ignored=["v"])
    except CheckpointError:
        return
    assert header["w"]["shape"] == [2]


@given(data=st.data())
def test_any_damage_to_a_file_is_harmless_or_a_checkpoint_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    path = save(folder, {"w": torch.ones(4), "v": torch.ones(2, 2, dtype=torch.float16)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    targets = torch.zeros(4), torch.zeros(2, 2, dtype=torch.bfloat16)
    try:
        load_weights(folder, [slot("w", targets[0]), slot("v", targets[1])])
    except CheckpointError:
        return
    assert all(target.isfinite().all() for target in targets)


# --- Where files, index and configuration contradict each other ----------------------------------


def tied_slots(embedding: torch.Tensor, made: list[torch.Tensor]) -> list[WeightSlot]:
    """The slots of an embedding and of a head that the configuration ties to it."""

    def untie() -> torch.Tensor:
        made.append(torch.full_like(embedding, 7))
        return made[-1]

    return [
        slot("embed", embedding, aliases=("head",)),
        slot("head", embedding, tied_to="embed", untie=untie),
    ]


@pytest.mark.parametrize("place", [(0, 0), (299, 6)], ids=["first value", "last value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_tensor_with_values_of_its_own_is_untied_and_named(
    tmp_path, monkeypatch, caplog, place, dtype
):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", 512)
    embed = torch.randn(300, 7).to(dtype)
    head = embed.clone()
    head[place] = 3.0
    save(tmp_path, {"embed": embed, "head": head})
    target, made = torch.zeros(300, 7, dtype=dtype), []
    load_weights(tmp_path, tied_slots(target, made))
    assert torch.equal(target, embed)
    assert len(made) == 1 and torch.equal(made[0], head)
    (record,) = caplog.records
    assert "head is tied to embed" in record.message and "using the files' head" in record.message


def test_a_tied_tensor_of_equal_values_stays_tied_and_nothing_is_logged(tmp_path, caplog):
    embed = torch.randn(300, 7)
    save(tmp_path, {"embed": embed, "head": embed.clone()})
    target, made = torch.zeros(300, 7), []
    report = load_weights(tmp_path, tied_slots(target, made))
    assert torch.equal(target, embed) and not made and not caplog.records
    assert report.tensors_read == 1


def test_a_tied_tensor_is_compared_in_the_dtype_it_is_loaded_in(tmp_path):
    embed = torch.randn(30, 7)
    save(tmp_path, {"embed": embed, "head": embed.bfloat16()})
    made: list[torch.Tensor] = []
    load_weights(tmp_path, tied_slots(torch.zeros(30, 7, dtype=torch.bfloat16), made))
    assert not made
    load_weights(tmp_path, tied_slots(torch.zeros(30, 7), made))
    assert len(made) == 1 and torch.equal(made[0], embed.bfloat16().float())


def test_a_tied_tensor_without_values_does_not_count(tmp_path):
    embed = torch.randn(30, 7)
    save(tmp_path, {"embed": embed, "head": torch.zeros(0)})
    target, made = torch.zeros(30, 7), []
    load_weights(tmp_path, tied_slots(target, made))
    assert torch.equal(target, embed) and not made


def test_a_tied_tensor_with_nan_or_of_another_shape_is_named(tmp_path):
    embed = torch.randn(30, 7)
    head = embed.clone()
    head[3, 3] = float("nan")
    save(tmp_path, {"embed": embed, "head": head})
    assert "head in" in error_of(tmp_path, *tied_slots(torch.zeros(30, 7), []))
    save(tmp_path, {"embed": embed, "head": torch.randn(32, 7)})
    text = error_of(tmp_path, *tied_slots(torch.zeros(30, 7), []))
    assert "head in model.safetensors is [32, 7], must be [30, 7]" in text


@pytest.mark.parametrize(
    "value",
    [torch.zeros(0), torch.zeros(3, 0), torch.arange(4), torch.tensor(True), torch.zeros(2).byte()],
    ids=["empty", "no columns", "int64", "bool", "uint8"],
)
def test_a_tensor_that_can_hold_no_weights_may_be_there(tmp_path, value):
    save(tmp_path, {"w": torch.ones(2), "layers.0.something": value})
    target = torch.zeros(2)
    load_weights(tmp_path, [slot("w", target)])
    assert (target == 1).all()


def test_an_unknown_tensor_of_floats_is_still_refused(tmp_path):
    save(tmp_path, {"w": torch.ones(2), "layers.0.something": torch.ones(1)})
    text = error_of(tmp_path, slot("w", torch.zeros(2)))
    assert "1 tensors belong to no part of the model" in text and "layers.0.something" in text


def test_a_tensor_that_the_index_leaves_out_is_used_if_needed_else_named(tmp_path, caplog):
    save(
        tmp_path,
        {"w": torch.ones(2), "v": torch.full((2,), 2.0), "dropped": torch.ones(2)},
        "a.safetensors",
    )
    index = {"weight_map": {"w": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    w, v = torch.zeros(2), torch.zeros(2)
    load_weights(tmp_path, [slot("w", w), slot("v", v)])
    assert (w == 1).all() and (v == 2).all()
    (record,) = caplog.records
    assert "1 tensors are not read" in record.message and "dropped in a.safe" in record.message


def test_a_tensor_is_found_in_another_listed_file_than_the_index_says(tmp_path):
    save(tmp_path, {"w": torch.ones(2)}, "a.safetensors")
    save(tmp_path, {"v": torch.full((2,), 2.0)}, "b.safetensors")
    index = {"weight_map": {"w": "b.safetensors", "v": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    w, v = torch.zeros(2), torch.zeros(2)
    load_weights(tmp_path, [slot("w", w), slot("v", v)])
    assert (w == 1).all() and (v == 2).all()


def test_of_a_tensor_in_two_files_the_index_chooses(tmp_path):
    save(tmp_path, {"w": torch.ones(2), "v": torch.ones(2)}, "a.safetensors")
    save(tmp_path, {"w": torch.full((2,), 2.0), "v": torch.full((2,), 2.0)}, "b.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    w, v = torch.zeros(2), torch.zeros(2)
    load_weights(tmp_path, [slot("w", w), slot("v", v)])
    assert (w == 1).all() and (v == 2).all()


def test_a_tensor_that_only_the_index_knows_is_missed_only_if_needed(tmp_path):
    save(tmp_path, {"w": torch.ones(2)}, "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "head": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_weights(tmp_path, [slot("w", torch.zeros(2))])
    text = error_of(tmp_path, slot("w", torch.zeros(2)), slot("head", torch.zeros(2)))
    assert "places 'head' in a.safetensors, which does not hold it" in text


# --- Random weights -------------------------------------------------------------------------------


def test_dummy_weights_do_not_depend_on_how_a_tensor_is_sharded():
    shape = (3000, 700)  # three chunks of rows
    whole = torch.zeros(shape)
    fill_dummy([slot("w", whole)], seed=3)
    shards = [(slice(100, 2999),), (slice(None), slice(5, 9)), (slice(1490, 1510), slice(3, 4))]
    for shard in shards:
        part = torch.zeros_like(whole[shard])
        fill_dummy([slot("w", part, shape, shard)], seed=3)
        assert torch.equal(part, whole[shard])


def test_dummy_weights_differ_by_seed_and_name_and_have_the_stated_spread():
    a, b, other = torch.zeros(500, 400), torch.zeros(500, 400), torch.zeros(500, 400)
    fill_dummy([slot("a", a), slot("b", b)], seed=0)
    fill_dummy([slot("a", other)], seed=1)
    assert not torch.equal(a, b) and not torch.equal(a, other)
    assert a.std().item() == pytest.approx(0.02, rel=0.02) and abs(a.mean().item()) < 2e-4


def test_dummy_norms_are_one_and_biases_zero():
    norm, bias = torch.full((5,), 7.0), torch.full((5,), 7.0)
    fill_dummy([slot("n", norm, kind="norm"), slot("b", bias, kind="bias")], seed=0)
    assert (norm == 1).all() and (bias == 0).all()


# --- Tables of ids --------------------------------------------------------------------------------


def ids_slot(name: str, rows: int, width: int, below: int) -> WeightSlot:
    target = torch.full((rows, width), -7)
    return slot(name, target, kind="ids", ids_below=below)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ids_arrive_as_int64_whatever_integers_the_files_hold(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("engine.weights.id_table.CHUNK_BYTES", 40)  # several pieces
    table = torch.rand(50, 200).argsort(1)[:, :3].contiguous()
    save(tmp_path, {"table": table.to(dtype), "w": torch.ones(2)})
    given = ids_slot("table", 50, 3, 200)
    report = load_weights(tmp_path, [given, slot("w", torch.zeros(2))])
    assert torch.equal(given.target, table)
    assert report.tensors_read == 2


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([4, 6, 0], "row 30 holds 6, which must be from 0 to 5"),
        ([-1, 2, 0], "row 30 holds -1, which must be from 0 to 5"),
        ([5, 2, 5], "row 30 holds 5 twice"),
    ],
)
def test_wrong_ids_are_errors_that_name_tensor_row_and_value(tmp_path, monkeypatch, row, text):
    monkeypatch.setattr("engine.weights.id_table.CHUNK_BYTES", 7 * 24)
    table = torch.arange(3).expand(40, 3).clone()
    table[30] = torch.tensor(row)
    save(tmp_path, {"gate.tid2eid": table})
    error = error_of(tmp_path, ids_slot("gate.tid2eid", 40, 3, 6))
    assert "gate.tid2eid in " in error and text in error


def test_a_table_of_ids_must_be_integers_of_its_shape(tmp_path):
    save(tmp_path, {"table": torch.ones(4, 2)})
    error = error_of(tmp_path, ids_slot("table", 4, 2, 6))
    assert "table in model.safetensors is F32" in error and "must be integers" in error
    save(tmp_path, {"table": torch.ones(4, 2, dtype=torch.int64)})
    assert "[4, 2], must be [5, 2]" in error_of(tmp_path, ids_slot("table", 5, 2, 6))


def test_dummy_ids_are_allowed_ones_and_equally_frequent():
    given = ids_slot("table", 12, 3, 9)
    fill_dummy([given], seed=0)
    assert all(len(set(row)) == 3 for row in given.target.tolist())
    assert given.target.flatten().bincount().tolist() == [4] * 9


def test_dummy_weights_in_bfloat16_are_the_rounded_float32_ones():
    wide, narrow = torch.zeros(64, 64), torch.zeros(64, 64, dtype=torch.bfloat16)
    fill_dummy([slot("w", wide)], seed=0)
    fill_dummy([slot("w", narrow)], seed=0)
    assert torch.equal(wide.to(torch.bfloat16), narrow)
