"""Train the two checkpoints that ship with Lockstep: a tiny Mixtral and a tiny OLMoE, on a CPU.

    python tools/train_tiny.py --arch both --out configs/checkpoints

writes tiny_mixtral/ and tiny_olmoe/ there: Hugging Face checkpoints with tokenizer, evaluation
sets, metrics.json, training log and README; and demo_prompts.jsonl next to them. The number of
steps is fixed and every batch is a function of the step, so a rerun repeats the run; an interrupted
one resumes from --state.

The text is the standard library (tiny/corpus.py), the tasks are synthetic (tiny/tasks.py), and both
are in every batch: rows are short at first, and twice as long while the learning rate falls to
zero. Copying and recall appear suddenly, a third to half of the way. Both models took 37.5 minutes
on two cores with AMX, bfloat16 products in hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tiny import corpus, demo, evaluate, export, report, runtime, tasks
from tiny.arch import ARCHS
from tiny.backward import TokenLosses
from tiny.data import Batches
from tiny.model import TinyMoe
from tiny.optim import make_optimizers
from tiny.recipe import RECIPES, Recipe
from transformers import PreTrainedTokenizerFast


class Trainer:
    """One model's training run: state, steps, progress lines, periodic saves."""

    def __init__(
        self,
        arch_name: str,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        text: corpus.Corpus,
        dtype: torch.dtype,
        state_path: Path,
    ) -> None:
        self.recipe, self.tokenizer, self.dtype = recipe, tokenizer, dtype
        self.state_path = state_path
        self.model = TinyMoe(ARCHS[arch_name], recipe.seed)
        self.optimizers = make_optimizers(
            self.model, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, dtype=dtype
        )
        stream = corpus.encode_documents(tokenizer, text.train)
        self.batches = Batches(tokenizer, stream, recipe.seed)
        self.probe_text = report.validation_chunks(tokenizer, text.validation)[::8]
        self.probe_tasks = tasks.evaluation_records(40, seed=1)
        self.step, self.seconds, self.log = 0, 0.0, []
        self.num_stream_tokens = stream.size

    def train_step(self) -> tuple[float, float]:
        """Run one step; returns the mean loss on text and on answers, in nats per token."""
        phase = self.recipe.phase(self.step)
        ids_BS, targets_BS, weights_BS = self.batches.batch(
            self.step,
            num_rows=phase.num_rows,
            length=phase.length,
            num_task_rows=phase.num_task_rows,
            task_shares=phase.task_shares,
        )
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits, balance, _ = self.model(ids_BS)
        losses = TokenLosses.apply(logits.flatten(0, 1), targets_BS.flatten())
        assert isinstance(losses, torch.Tensor)
        losses = losses.view_as(weights_BS)
        loss = (losses * weights_BS).sum() / weights_BS.sum()
        (loss + self.recipe.balance_coefficient * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        text_loss = losses[phase.num_task_rows :].mean().item()
        answers = losses[: phase.num_task_rows][weights_BS[: phase.num_task_rows] > 1]
        return text_loss, answers.mean().item()

    def run(self, num_steps: int, *, log_every: int, probe_every: int, save_every: int) -> None:
        """Train up to `num_steps` in all, resuming from the saved state when there is one."""
        self.load_state()
        text_losses, answer_losses, num_tokens, started = [], [], 0, time.perf_counter()
        while self.step < num_steps:
            phase = self.recipe.phase(self.step)
            text_loss, answer_loss = self.train_step()
            text_losses.append(text_loss)
            answer_losses.append(answer_loss)
            num_tokens += phase.num_rows * phase.length
            if self.step % log_every == 0 or self.step == num_steps:
                seconds = time.perf_counter() - started
                self.seconds += seconds
                row = {
                    "step": self.step,
                    "seconds": round(self.seconds, 1),
                    "text_loss": round(sum(text_losses) / len(text_losses), 4),
                    "answer_loss": round(sum(answer_losses) / len(answer_losses), 4),
                    "tokens_per_s": round(num_tokens / seconds),
                }
                if self.step % probe_every == 0:
                    row |= self.probe()
                self.log.append(row)
                print(json.dumps(row), flush=True)
                text_losses, answer_losses, num_tokens = [], [], 0
                started = time.perf_counter()
            if self.step % save_every == 0 or self.step == num_steps:
                self.save_state()

    @torch.no_grad()
    def probe(self) -> dict[str, object]:
        """Return validation loss and task accuracy on a part of the evaluation sets."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = evaluate.validation_loss(self.logits, self.tokenizer, self.probe_text)
            accuracy = evaluate.task_accuracy(self.logits, self.tokenizer, self.probe_tasks)
        return {"validation_loss": round(loss, 4), "accuracy": accuracy}

    def logits(self, ids_1S: torch.Tensor) -> torch.Tensor:
        """Return logits of one sequence, [1, S, V]."""
        return self.model(ids_1S)[0]

    def save_state(self) -> None:
        """Write model, optimizers, step and log; the old state stays until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_path)

    def load_state(self) -> None:
        """Continue from the saved state, if any."""
        if not self.state_path.exists():
            return
        state = torch.load(self.state_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        print(f"resumed from {self.state_path} at step {self.step}", flush=True)


def build_tokenizer(text: corpus.Corpus) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the training text and enough task lines to make every word a token."""
    lines = [" ".join(tasks.WORDS)] * 400
    return corpus.train_tokenizer(
        [*text.train, *lines], max_length=ARCHS["mixtral"].max_position_embeddings
    )


def main() -> None:
    """Parse the flags, train, export, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", choices=[*ARCHS, "both"], default="both")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives tiny_<arch>/")
    parser.add_argument("--steps", type=int, help="stop after so many (default: the whole recipe)")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--state", type=Path, default=Path(".train_tiny"), help="resumable state")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")

    if args.threads < 1:
        parser.error(f"--threads {args.threads}: must be at least 1")

    torch.set_num_threads(args.threads)
    runtime.keep_freed_memory()
    dtype = runtime.choose_dtype(args.dtype)
    text = corpus.load_corpus()
    tokenizer = build_tokenizer(text)
    export.write_jsonl(args.out / "demo_prompts.jsonl", demo.demo_prompts())
    for name in ARCHS if args.arch == "both" else [args.arch]:
        recipe = RECIPES[name]
        num_steps = min(args.steps or recipe.steps, recipe.steps)
        state_path = args.state / f"{name}.pt"
        trainer = Trainer(name, recipe, tokenizer, text, dtype, state_path)
        print(
            f"{name}: {sum(p.numel() for p in trainer.model.parameters())} parameters, "
            f"{trainer.num_stream_tokens} training tokens, {dtype}, {num_steps} steps",
            flush=True,
        )
        trainer.run(num_steps, log_every=50, probe_every=400, save_every=200)
        out = args.out / f"tiny_{name}"
        export.save_checkpoint(trainer.model, tokenizer, out)
        metrics = report.measure(trainer.model, tokenizer, text, out)
        metrics |= {
            "steps": trainer.step,
            "training_tokens": recipe.num_tokens,
            "training_seconds": round(trainer.seconds),
            "training_dtype": str(dtype).removeprefix("torch."),
            "hardware": runtime.hardware(),
        }
        report.write(out, trainer.model.arch, metrics, trainer.log, command=" ".join(sys.argv))
        print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
