"""`Request`: the prompt of one completion, and of a line the further ones that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.request.errors import RequestError
from engine.request.params import SamplingParams
from engine.request.token_ids import check_token_ids

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
MAX_CHOICES = 2048  # completions that one line may ask for
_INDEX_BITS = 40  # an index is below 2**40; `Request.key` has the choice above it


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete. Token ids of numpy or torch become whole numbers of Python.

    A line that asks for several completions is its first one's request, with `others`.

    Raises:
        ValueError: a wrong index.
        RequestError: the prompt is empty or holds what is no token id.
    """

    index: int  # its number in the whole job, from 0, equal on every rank: it seeds sampling and
    # breaks routing ties
    id: str | int  # the user's name for it
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    choice: int = 0  # its number among the completions that one line asks for
    prompt_text: str | None = None  # as given, with `echo`; None: decoded from the token ids
    others: tuple[Request, ...] = ()  # of the first choice: the line's further ones
    endpoint: Endpoint | None = None  # of an OpenAI batch line; None: a line of our own form

    def __post_init__(self) -> None:
        if type(self.index) is not int or self.index < 0:
            raise ValueError(f"index = {self.index!r}: must be a whole number from 0")
        try:
            ids = check_token_ids("prompt_token_ids", self.prompt_token_ids)
        except RequestError as error:
            raise RequestError(error.code, f"request {self.id!r}: {error}") from error
        object.__setattr__(self, "prompt_token_ids", ids)

    @property
    def choices(self) -> tuple[Request, ...]:
        """Return the requests of all completions of the line in their order, this one first."""
        return (self, *self.others)

    @property
    def key(self) -> int:
        """Return what seeds its draws: of a first choice the line's index."""
        return self.index + (self.choice << _INDEX_BITS)

    @classmethod
    def of_line(
        cls,
        index: int,
        id: str | int,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        prompt_texts: Sequence[str | None] = (),
        endpoint: Endpoint | None = None,
    ) -> Request:
        """Return the request of a line: `params.n` choices of each prompt, prompt after prompt.

        Args:
            prompts: token ids, at least one prompt.
            prompt_texts: of the prompts that were given as text; kept where `params.echo`.

        Raises:
            RequestError: more choices than a line may have, or a prompt that is none.
        """
        if len(prompts) * params.n > MAX_CHOICES:
            raise RequestError(
                "invalid_request",
                f"{len(prompts)} prompts and n = {params.n} are {len(prompts) * params.n} "
                f"completions; a line may ask for {MAX_CHOICES}",
            )
        texts = list(prompt_texts) if params.echo else []
        texts += [None] * (len(prompts) - len(texts))
        first, *others = [
            cls(
                index=index,
                id=id,
                prompt_token_ids=ids,
                params=params,
                choice=place * params.n + sample,
                prompt_text=text,
                endpoint=endpoint,
            )
            for place, (ids, text) in enumerate(zip(prompts, texts, strict=True))
            for sample in range(params.n)
        ]
        return replace(first, others=tuple(others)) if others else first
