"""Cases: what a seed makes of a small job. Each generator damages one kind of input.

lines         the input file
openai        an input of OpenAI's lines, answered in OpenAI's pair of files
config        config.json
weights       a safetensors file: its header's JSON, its length, its bytes
files         generation_config.json, tokenizer files, the index of the weights
settings      --set
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.fuzz.mutations import damaged, misspelt, mutated, odd_value, to_json

LINES: list[dict[str, Any]] = [
    {"id": "a", "prompt": "abc", "max_new_tokens": 2},
    {"id": 1, "prompt_token_ids": [5, 6, 7], "prompt_logprobs": True, "max_new_tokens": 0},
    {"id": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "seed": 3},
    {"id": "s", "prompt": "a b", "stop": ["x", "</s>"], "temperature": 1.5, "top_p": 0.9},
    {
        "custom_id": "o",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_completion_tokens": 2,
        },
    },
    {
        "custom_id": "p",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "a", "max_tokens": 2, "logprobs": 1},
    },
]
OPENAI_LINES: list[dict[str, Any]] = [
    *[line for line in LINES if "body" in line],
    {
        "custom_id": "choices",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": ["a", [5, 6]], "n": 2, "temperature": 1, "seed": 1, "stop": ["b", "c"]},
    },
    {
        "custom_id": "echo",
        "url": "/v1/completions",
        "body": {"prompt": "ab", "max_tokens": 1, "logprobs": 2, "echo": True, "min_tokens": 1},
    },
    {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "x"},
                {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
                {"role": "tool", "content": "7", "tool_call_id": "t"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1},
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
        },
    },
]
LINE_KEYS = """
    id custom_id prompt prompt_token_ids messages body url method max_tokens max_new_tokens n
    temperature top_p top_k seed stop stop_token_ids logprobs prompt_logprobs ignore_eos stream
    sampling_params parameters guided_json bad_words max_length answer tools response_format
    top_logprobs echo best_of min_p min_tokens logit_bias presence_penalty frequency_penalty
    repetition_penalty chat_template_kwargs reasoning_effort tool_choice user store
""".split()
CONFIG_KEYS = """
    rope_scaling rope_parameters rope_theta sliding_window quantization_config auto_map layer_types
    eos_token_id tie_word_embeddings norm_topk_prob moe_layer_freq first_k_dense_replace head_dim
    attention_bias hidden_act torch_dtype dtype num_experts n_shared_experts
    num_nextn_predict_layers
    decoder_sparse_step mlp_only_layers partial_rotary_factor attention_dropout architectures
    model_type max_position_embeddings rms_norm_eps num_local_experts num_experts_per_tok
""".split()
SETTINGS = """
    model.path model.tokenizer model.dtype model.max_model_len parallel.expert parallel.tensor
    moe.capacity.policy moe.capacity.factor moe.capacity.phases moe.overlap.chunks
    scheduler.max_batch_tokens scheduler.max_sequences scheduler.block_size scheduler.kv_cache_gib
    scheduler.kv_cache_blocks sampling.max_new_tokens sampling.temperature sampling.top_p
    sampling.stop sampling.stop_token_ids sampling.seed runtime.timeout_s runtime.threads
    runtime.device runtime.drain_s runtime.seed profiler.spans profiler.metrics_port
    profiler.routing profiler.routing_claims
    profiler.metrics_host moe.experts.backend
""".split()


@dataclass(slots=True)
class Case:
    """One run: the command line's overrides, and how many lines of the input need a record."""

    overrides: list[str] = field(default_factory=list)
    num_lines: int = 0
    records: Literal["lockstep", "openai"] = "lockstep"  # batch.format


def lines(folder: Path, chance: random.Random) -> Case:
    """Write an input of damaged lines."""
    # The first lines decide whether the file is JSONL at all.
    good = [to_json({**LINES[0], "id": f"good{number}"}) for number in range(5)]
    return Case(num_lines=_write_input(folder, good, _damaged_lines(LINES, chance)))


def openai(folder: Path, chance: random.Random) -> Case:
    """Write an input of damaged OpenAI lines."""
    good = [to_json({**OPENAI_LINES[0], "custom_id": f"good{number}"}) for number in range(5)]
    raw = [line for line in _damaged_lines(OPENAI_LINES, chance) if not _is_own(line)]
    return Case(num_lines=_write_input(folder, good, raw), records="openai")


def _damaged_lines(originals: list[dict[str, Any]], chance: random.Random) -> list[bytes]:
    raw = [_line(originals, chance).replace(b"\n", b" ") for _ in range(40)]
    return [line for line in raw if line and not line.isspace()]


def _line(originals: list[dict[str, Any]], chance: random.Random) -> bytes:
    record: Any = chance.choice(originals)
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        record = mutated(record, chance, LINE_KEYS)
    raw = to_json(record)
    if chance.random() < 0.2:
        raw = damaged(raw, chance)
    if chance.random() < 0.02:
        raw = raw.replace(b'"hi"', b"[" * 100_000)
    return raw


def _is_own(line: bytes) -> bool:
    """Return whether a line has lost all of OpenAI's form: one is enough to refuse the file."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "custom_id" not in value and "body" not in value


def _write_input(folder: Path, good: list[bytes], raw: list[bytes]) -> int:
    (folder / "in.jsonl").write_bytes(b"\n".join([*good, *raw]) + b"\n")
    return len(good) + len(raw)


def config(folder: Path, chance: random.Random) -> Case:
    """Change fields of config.json."""
    _change_json(folder / "model" / "config.json", chance, CONFIG_KEYS)
    return Case()


def weights(folder: Path, chance: random.Random) -> Case:
    """Damage a file of weights."""
    path = folder / "model" / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = chance.random()
    if kind < 0.5:
        name = chance.choice([key for key in header if key != "__metadata__"])
        if chance.random() < 0.2:
            header[misspelt(name, chance)] = header.pop(name)
        else:
            header[name] = mutated(header[name], chance, ["dtype", "shape", "data_offsets"])
        text = to_json(header)
        raw = struct.pack("<Q", len(text)) + text + data
    elif kind < 0.7:
        raw = struct.pack("<Q", chance.choice([0, 1, length - 1, 2**40, 2**64 - 1])) + raw[8:]
    elif kind < 0.85:
        raw = raw[: chance.randrange(len(raw))]
    else:
        raw = damaged(raw[: 8 + length], chance) + data
    path.write_bytes(raw)
    return Case()


def files(folder: Path, chance: random.Random) -> Case:
    """Change or damage a JSON file beside the weights."""
    model = folder / "model"
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model.safetensors"}}
    if chance.random() < 0.2:
        (model / "model.safetensors.index.json").write_bytes(to_json(index))
    others = [path for path in model.glob("*.json") if path.name != "config.json"]
    path = chance.choice(sorted(others))
    if chance.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), chance))
    else:
        _change_json(path, chance, ["eos_token_id", "chat_template", "tokenizer_class", "model"])
    return Case()


def settings(folder: Path, chance: random.Random) -> Case:
    """Give odd values on the command line."""
    overrides = []
    for _ in range(chance.choice([1, 1, 2])):
        name = chance.choice(SETTINGS)
        name = misspelt(name, chance) if chance.random() < 0.1 else name
        value = odd_value(chance)
        text = value if isinstance(value, str) else to_json(value).decode()
        # An argument of a process holds no NUL and no half of a surrogate pair.
        text = text.replace("\x00", "").encode(errors="ignore").decode()
        overrides.append(f"{name}={text}")
    return Case(overrides)


def _change_json(path: Path, chance: random.Random, names: list[str]) -> None:
    value = json.loads(path.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 2])):
        value = mutated(value, chance, names)
    path.write_bytes(to_json(value))


Generator = Callable[[Path, random.Random], Case]
GENERATORS: dict[str, Generator] = {
    each.__name__: each for each in (lines, openai, config, weights, files, settings)
}
