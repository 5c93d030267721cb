"""Measure a written checkpoint and write the evidence next to it: eval/, metrics.json, README.md.

Called by tools/train_tiny.py after export. Figures come from transformers' float32 model on the
stored weights and from exactly the files that are written, so anyone can repeat them.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from tiny import evaluate, export
from tiny.arch import TinyArch
from tiny.corpus import Corpus
from tiny.model import TinyMoe
from tiny.tasks import TASKS, evaluation_records
from transformers import PreTrainedTokenizerFast

EVAL_SEED = 0
RECORDS_PER_TASK = 200
VALIDATION_BYTES = 180_000


def validation_chunks(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[str]:
    """Return pieces of held-out files, evenly spread, of about VALIDATION_BYTES in all."""
    chunks = evaluate.text_chunks(tokenizer, documents, tokenizer.model_max_length)
    num_bytes = sum(len(chunk.encode()) for chunk in chunks)
    return chunks[:: max(1, -(-num_bytes // VALIDATION_BYTES))]


def measure(
    model: TinyMoe, tokenizer: PreTrainedTokenizerFast, text: Corpus, out: Path
) -> dict[str, Any]:
    """Write eval/ under `out`, then measure the checkpoint there on it."""
    chunks = validation_chunks(tokenizer, text.validation)
    records = evaluation_records(RECORDS_PER_TASK, EVAL_SEED)
    export.write_jsonl(
        out / "eval" / "validation.jsonl",
        [{"id": f"text-{i:03d}", "prompt": chunk} for i, chunk in enumerate(chunks)],
    )
    export.write_jsonl(
        out / "eval" / "tasks.jsonl",
        [
            {
                "id": f"{record.task}-{i % RECORDS_PER_TASK:03d}",
                "task": record.task,
                "prompt": record.prompt,
                "answer": record.answer,
            }
            for i, record in enumerate(records)
        ],
    )
    exported = export.load_checkpoint(out)
    probe = torch.tensor([tokenizer(chunk)["input_ids"][:128] for chunk in chunks[:4]])
    error = export.logits_error(model, exported, probe)

    def logits(ids_1S: torch.Tensor) -> torch.Tensor:
        return exported(ids_1S).logits

    loss = evaluate.validation_loss(logits, tokenizer, chunks)
    entropy = evaluate.unigram_entropy(tokenizer, chunks)
    loads = evaluate.router_loads(model, tokenizer, chunks)
    num_tokens = sum(map(len, tokenizer(chunks, add_special_tokens=False)["input_ids"]))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_loss": round(loss, 4),
        "unigram_entropy": round(entropy, 4),
        "ratio": round(loss / entropy, 4),
        "validation_tokens": num_tokens,
        "task_accuracy": evaluate.task_accuracy(logits, tokenizer, records),
        "router_max_over_mean": [round(x, 2) for x in evaluate.max_over_mean(loads)],
        "router_loads": loads,
        "logits_error_to_transformers": error,
        "corpus_sha256": text.sha256,
        "corpus_python": platform.python_version(),
    }


def write(
    out: Path, arch: TinyArch, metrics: dict[str, Any], log: list[dict[str, Any]], command: str
) -> None:
    """Write metrics.json, training_log.jsonl and README.md."""
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (out / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (out / "README.md").write_text(readme(arch, metrics, command))


def readme(arch: TinyArch, metrics: dict[str, Any], command: str) -> str:
    """Return the checkpoint's README: what it is, how it was made, what was measured."""
    sizes = (
        f"{arch.num_layers} layers, hidden {arch.hidden_size}, {arch.num_heads} heads "
        f"({arch.num_kv_heads} KV heads), {arch.num_experts} experts of width "
        f"{arch.expert_hidden_size}, top-{arch.top_k}, vocabulary {arch.vocab_size}, context "
        f"{arch.max_position_embeddings}"
    )
    figures = {
        "validation loss": f"{metrics['validation_loss']:.3f} nats per token",
        "unigram entropy of the same tokens": f"{metrics['unigram_entropy']:.3f} nats per token",
        "ratio of the two": f"{metrics['ratio']:.3f}",
        "tokens in eval/validation.jsonl": str(metrics["validation_tokens"]),
        "busiest expert over mean, layer by layer": ", ".join(
            f"{x:.2f}" for x in metrics["router_max_over_mean"]
        ),
        "logits against the training module": f"{metrics['logits_error_to_transformers']:.0e}",
    }
    accuracy = {
        f"{task} | {metrics['task_accuracy'][task]:.3f}": (make.__doc__ or "").partition("\n")[0]
        for task, make in TASKS.items()
    }
    tokens = f"{metrics['training_tokens'] / 1e6:.1f}M tokens"
    minutes = f"{metrics['training_seconds'] / 60:.0f} minutes"
    return f"""# tiny_{arch.model_type}

A {metrics["parameters"] / 1e6:.2f}M-parameter {arch.model_type}: {sizes}.

Made by

    python {command}

in {metrics["steps"]} steps, {tokens} and {minutes} of wall clock
({metrics["hardware"]}, {metrics["training_dtype"]} autocast),
on the standard library of Python {metrics["corpus_python"]}, one file in sixteen held out, and
synthetic tasks.

| figure | |
|---|---|
{_rows(figures)}

| task | exact match | what it asks |
|---|---|---|
{_rows(accuracy)}

Weights are stored in bfloat16; every figure was taken from the stored weights in float32 with
transformers, on the files under eval/. Exact match is greedy, end of sequence included, over
{RECORDS_PER_TASK} prompts a task that training never drew. The router was trained with a small
balance loss only, so loads are naturally uneven.

eval/validation.jsonl holds excerpts of CPython's standard library, and the weights were trained on
it: Copyright (c) Python Software Foundation, PSF License Version 2.
"""


def _rows(table: dict[str, str]) -> str:
    return "\n".join(f"| {key} | {value} |" for key, value in table.items())
