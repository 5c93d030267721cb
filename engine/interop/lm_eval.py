"""The engine as a model of lm-evaluation-harness: `LockstepLM` on rank 0 of `EvaluationRanks`.

    results = lm_eval.simple_evaluate(model=LockstepLM(ranks), tasks=["arc_easy"])

Texts are encoded, cut and scored by the rules of the harness's own model on transformers, so that
scores are comparable, with one exception: tokens to score count in the context too, which therefore
holds one token less before the last of them. `tools/evaluate.py` is the program.

Needs the package lm-eval, which only this module and `lm_eval_settings.py` import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    has_bos_prefix,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from engine.interop.lm_eval_ranks import EvaluationRanks, Job, Outcome
from engine.interop.lm_eval_settings import Generation
from engine.request import SamplingParams

# Only the prompt is run; of each of its places also the likeliest token, for is_greedy.
_SCORE = SamplingParams(max_new_tokens=0, prompt_logprobs=True, prompt_top_logprobs=1)


class LockstepLM(TemplateLM):
    """The engine of `ranks`, on rank 0, while it drives them.

    Raises:
        ValueError: the checkpoint has no tokenizer.
    """

    def __init__(self, ranks: EvaluationRanks) -> None:
        super().__init__()
        self._ranks = ranks
        self.tokenizer: Any = ranks.llm.tokenizer
        if self.tokenizer is None:
            raise ValueError(
                f"model.path = {ranks.llm.config.model.path!r}: has no tokenizer, and tasks are "
                "text; name one with model.tokenizer"
            )

    @property
    def max_length(self) -> int:
        """Tokens of the context, prompt and new tokens together."""
        return self._ranks.llm.max_model_len

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, in the names of files that the harness caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the text that the tokenizer's chat template makes of them.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: leave out --apply-chat-template")
        try:
            return self._render(chat_history, add_generation_prompt)
        except Exception:  # templates refuse with an error of their own; some have no system role
            others = [each for each in chat_history if each["role"] != "system"]
            try:
                return self._render(others, add_generation_prompt)
            except Exception as error:
                raise ValueError(f"the chat template refuses a task's messages: {error}") from error

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            string: of any length.
            add_special_tokens: None: as the tokenizer does by itself, but never a second BOS.
            kwargs: ignored.
        """
        if add_special_tokens is None:
            if not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
                return self.tokenizer.encode(string)
            add_special_tokens = False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return log probability and is_greedy of each (texts, context, continuation)."""
        jobs = []
        for texts, context, continuation in requests:
            if not continuation:
                raise ValueError(f"the continuation of {texts!r} has no tokens to score")
            if len(continuation) >= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is too long to score: the "
                    f"context holds {self.max_length} with a token before it; raise "
                    "model.max_model_len"
                )
            tokens = [*context, *continuation][-self.max_length :]
            jobs.append(Job(tokens, _SCORE, len(continuation)))
        outcomes = self._run(jobs, "loglikelihood", disable_tqdm)
        scores = [(outcome.logprob, outcome.is_greedy) for outcome in outcomes]
        for (texts, *_), score in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log probability of whole texts, longer ones in windows of the context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in of_text]
            windows += [(None, *part) for part in parts]
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return new texts up to a stop string each; prompts lose tokens from the left."""
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        jobs, settings = [], []
        for text, given in (request.args for request in requests):
            setting = Generation.of(given, self.max_gen_toks, eos, self._ranks.llm.config.sampling)
            room = self.max_length - setting.params.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks = {setting.params.max_new_tokens}: must leave room for a prompt "
                    f"in the context of {self.max_length} tokens; lower it with --gen-kwargs"
                )
            jobs.append(Job(self.tok_encode(text)[-room:], setting.params))
            settings.append(setting)
        outcomes = self._run(jobs, "generate_until", disable_tqdm)
        texts = [
            postprocess_generated_text(outcome.text, list(setting.until), None)
            for outcome, setting in zip(outcomes, settings, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _run(self, jobs: Sequence[Job], name: str, disable_tqdm: bool) -> list[Outcome]:
        """Return the outcomes of jobs, with a progress bar.

        Raises:
            ValueError: one could not run: a score without it would be another task's.
        """
        for job in jobs:
            self._ranks.llm.encode(job.prompt_token_ids)  # a token id that the model does not have
        with tqdm(total=len(jobs), desc=name, unit="request", disable=disable_tqdm) as bar:
            outcomes = self._ranks.run(jobs, lambda count: bar.update(count - bar.n))
            bar.update(len(jobs) - bar.n)  # replicas count for themselves
        failed = [(index, each.error) for index, each in enumerate(outcomes) if each.error]
        if failed:
            index, error = failed[0]
            raise ValueError(
                f"{len(failed)} of {len(jobs)} {name} requests could not run; number {index}, of "
                f"{len(jobs[index].prompt_token_ids)} tokens: {error}"
            )
        return outcomes
