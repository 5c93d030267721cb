"""Roofline bound: the least time that a generation job can take on this machine in float32.

Two rates are measured in the same run as the candidates, on all cores at once (`peak.c`): fused
multiply-adds in registers, and reads of memory. From the model's shapes and the job:

    compute   all matrix products that the job needs, at the first rate: of the last layer keys and
              values of all tokens, the rest only of those that choose a new one
    read      every weight that a step needs, once per step, at the second

A job takes at least as many steps as a request has new tokens, and at best the two overlap
entirely: the bound is the larger of them. Caches do not hold the weights of a model worth a bench;
softmax, norms, the KV cache and the interpreter are free here.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.compiled import compile_for_here
from bench.jobs import Job

_SOURCE = Path(__file__).with_name("peak.c")
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of all cores together."""

    flops: float  # floating-point operations per second
    read: float  # bytes per second


@dataclass(frozen=True, slots=True)
class RooflineBound:
    """Least seconds of a job."""

    compute: float  # by computing alone
    read: float  # by reading weights alone

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute, self.read)


def measure_rates(cores: list[int], seconds: float = 1.0) -> Rates:
    """Measure both rates on these cores.

    Raises:
        RuntimeError: there is no C compiler or no taskset.
    """
    if shutil.which("taskset") is None:
        raise RuntimeError("no taskset here: install util-linux")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        program = compile_for_here(_SOURCE, Path(folder))
        return Rates(
            _rate(program, "flops", cores, seconds), _rate(program, "read", cores, seconds)
        )


def _rate(program: Path, kind: str, cores: list[int], seconds: float) -> float:
    running = [
        subprocess.Popen(
            ["taskset", "--cpu-list", str(core), program, kind, str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for core in cores
    ]
    return sum(float(process.communicate()[0].split()[0]) for process in running)


def roofline_bound(model: dict[str, Any], job: Job, new_tokens: int, rates: Rates) -> RooflineBound:
    """Return the bound of a job on a Mixtral-shaped model.

    Args:
        model: the fields of its config.json.
        new_tokens: per request.
    """
    layers, hidden, ffn = (
        model[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    experts, top_k = model["num_local_experts"], model["num_experts_per_tok"]
    heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
    head_dim = model.get("head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    expert = 3 * hidden * ffn
    dense = layers * (attention + hidden * experts)
    logits = hidden * model["vocab_size"]

    tokens = pairs = last_pairs = 0  # through the layers; of a query and a key
    for prompt in job.prompts:
        length = len(prompt) + new_tokens - 1  # the last new token goes through no layer
        tokens += length
        pairs += length * (length + 1) // 2
        last_pairs += new_tokens * (len(prompt) + length) // 2
    layer, kv = attention + hidden * experts + top_k * expert, 2 * hidden * head_dim * kv_heads
    flops = 2 * tokens * ((layers - 1) * layer + kv)
    flops += 2 * len(job.prompts) * new_tokens * (layer - kv + logits)
    flops += 4 * ((layers - 1) * pairs + last_pairs) * heads * head_dim
    # A step of B tokens, each with K of E experts at random, needs this share of the experts.
    share = 1 - (1 - top_k / experts) ** len(job.prompts)
    weights = dense + logits + share * layers * experts * expert
    return RooflineBound(flops / rates.flops, _FLOAT_BYTES * weights * new_tokens / rates.read)
