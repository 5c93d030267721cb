"""Generation settings of lm-evaluation-harness as `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
)

from engine.config import SamplingConfig
from engine.request import SamplingParams

# Settings of transformers' generate that change nothing with these values.
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


@dataclass(frozen=True, slots=True)
class Generation:
    """How the new text of one request is made, and where it is cut."""

    params: SamplingParams
    until: tuple[str, ...]  # the text ends before the first of them, the end of sequence included

    @classmethod
    def of(
        cls, given: Mapping[str, Any], max_gen_toks: int, eos: str, config: SamplingConfig
    ) -> Generation:
        """Return the settings of one request.

        Args:
            given: a task's generation_kwargs.
            max_gen_toks: where it does not say.
            eos: text of the end of sequence.
            config: its seed is taken; the rest is the task's.

        Raises:
            ValueError: a setting that the engine does not have.
        """
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), max_gen_toks))
        stops = settings.pop("stop", None) or []
        until = [*settings.pop("until"), *([stops] if isinstance(stops, str) else stops)]
        until = handle_stop_sequences(until, eos)
        num_new = settings.pop("max_gen_toks")
        is_sampled = settings.pop("do_sample")
        temperature = settings.pop("temperature", 1.0) if is_sampled else 0.0
        settings.pop("temperature", None)
        for name, value in _WITHOUT_EFFECT.items():
            if settings.get(name, value) == value:
                settings.pop(name, None)
        stop = tuple(text for text in until if text and text != eos)  # the engine knows its own end
        try:
            params = SamplingParams.from_config(
                SamplingConfig(seed=config.seed),
                max_new_tokens=num_new,
                temperature=temperature,
                stop=stop,
                **settings,
            )
        except ValueError as error:
            raise ValueError(f"generation_kwargs: {error}") from error
        return cls(params, tuple(until))
