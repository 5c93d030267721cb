"""A sequence's life from prompt to completion.

Run: pytest tests/unit/generation/test_sequence.py
"""

import pytest

from engine.generation.sequence import ChoiceGroup, Sequence, Status
from engine.request import Request, RequestError, SamplingParams


def make(*, eos=(), **params) -> Sequence:
    request = Request(index=3, id="r", prompt_token_ids=(7, 8, 9), params=SamplingParams(**params))
    return Sequence(request, eos_token_ids=eos)


def test_length_ends_a_sequence_and_the_completion_counts_its_tokens():
    seq = make(max_new_tokens=2)
    seq.append(1)
    assert seq.finish_reason is None
    assert seq.num_generated == 1
    seq.append(2)
    assert seq.status is Status.FINISHED
    done = seq.completion()
    assert (done.index, done.id, done.finish_reason, done.text) == (3, "r", "length", "")
    assert (done.token_ids, done.prompt_tokens, done.completion_tokens) == ([1, 2], 3, 2)
    assert done.logprobs is None
    assert done.prompt_logprobs is None
    assert done.error is None


def test_a_stop_id_on_the_last_token_is_a_stop_and_stays_in_the_token_ids():
    seq = make(max_new_tokens=2, eos={5})
    seq.append(1)
    seq.append(5)
    done = seq.completion()
    assert (done.finish_reason, done.token_ids, done.completion_tokens) == ("stop", [1, 5], 2)


def test_logprobs_are_kept_one_per_token_and_prompt_logprobs_begin_with_none():
    seq = make(max_new_tokens=2, logprobs=True, prompt_logprobs=True)
    assert seq.prompt_logprobs == [None]
    seq.append(1, -0.25)
    seq.append(2, -0.5)
    assert seq.completion().logprobs == [-0.25, -0.5]
    with pytest.raises(AssertionError, match="asked for logprobs"):
        make(logprobs=True).append(1)


def test_timing_is_ordered_and_complete_once_finished():
    seq = make(max_new_tokens=2)
    assert seq.timing.first_token is None
    seq.append(1)
    first = seq.timing.first_token
    seq.append(2)
    assert first is not None
    assert seq.timing.first_token == first
    assert seq.timing.finished is not None
    assert seq.timing.arrived <= first <= seq.timing.finished


def test_an_error_keeps_the_tokens_and_carries_its_message():
    seq = make()
    seq.append(1)
    seq.finish("error", RequestError("non_finite_logits", "logits are not finite"))
    done = seq.completion()
    assert done.error == {
        "code": "non_finite_logits",
        "message": "logits are not finite",
        "line": None,
    }
    assert (done.finish_reason, done.token_ids) == ("error", [1])
    with pytest.raises(AssertionError, match="finishes twice"):
        seq.finish("length")


def test_the_prompt_of_the_request_is_never_changed():
    prompt = [7, 8]
    seq = Sequence(Request(index=0, id="r", prompt_token_ids=prompt))
    seq.append(1)
    assert prompt == [7, 8]


def test_an_unfinished_sequence_has_no_completion():
    with pytest.raises(AssertionError, match="'r' is not finished"):
        make().completion()


class PanicException(BaseException):
    """As a panic of the Rust code inside a tokenizer arrives: no Exception."""


class Broken:
    """A tokenizer that cannot decode token 99."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def decode(self, ids, /, *, skip_special_tokens):
        if 99 in ids:
            raise self.error
        return "x" * len(ids)


ERRORS = [IndexError("piece id is out of range"), Exception("bare"), PanicException("bare")]


@pytest.mark.parametrize("error", ERRORS)
def test_tokens_that_cannot_be_decoded_are_the_error_of_their_request(error):
    params = SamplingParams(max_new_tokens=4, stop=("y",))
    seq = Sequence(
        Request(index=0, id="r", prompt_token_ids=[7], params=params), tokenizer=Broken(error)
    )
    seq.append(1)
    seq.append(99)
    assert seq.status is Status.FINISHED
    done = seq.completion()
    assert (done.finish_reason, done.token_ids, done.text) == ("error", [1, 99], "x")
    assert done.error is not None and str(error) in done.error["message"]
    assert "cannot decode" in done.error["message"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_text_that_cannot_be_decoded_at_the_end_is_an_error_too(error):
    seq = Sequence(
        Request(index=0, id="r", prompt_token_ids=[7], params=SamplingParams(max_new_tokens=2)),
        tokenizer=Broken(error),
    )
    seq.append(1)
    seq.append(99)
    done = seq.completion()
    assert (done.finish_reason, done.token_ids, done.text) == ("error", [1, 99], "")
    assert done.error is not None and str(error) in done.error["message"]


def test_a_prompt_that_cannot_be_decoded_is_the_error_of_its_request():
    params = SamplingParams(max_new_tokens=4, stop=("y",))
    request = Request(index=0, id="r", prompt_token_ids=[99], params=params)
    seq = Sequence(request, tokenizer=Broken(IndexError("no such piece")))
    seq.append(1)
    assert seq.completion().finish_reason == "error"


class Letters:
    """A tokenizer whose token n is the nth letter."""

    def decode(self, ids, *, skip_special_tokens):
        return "".join(chr(ord("a") + token) for token in ids)


def test_the_likeliest_tokens_are_kept_one_list_per_token():
    seq = make(max_new_tokens=2, logprobs=2, prompt_logprobs=1)
    assert seq.prompt_top_logprobs == [None]
    seq.append(1, -0.25, [(1, -0.25), (0, -2.0)])
    seq.append(2, -0.5, [(2, -0.5), (0, -1.0)])
    assert seq.completion().top_logprobs == [[(1, -0.25), (0, -2.0)], [(2, -0.5), (0, -1.0)]]


@pytest.mark.parametrize(("prompt_text", "expected"), [("Hij", "Hij"), (None, "hij")])
def test_echo_puts_the_prompts_text_before_the_new_text(prompt_text, expected):
    params = SamplingParams(max_new_tokens=1, echo=True)
    ids = (7, 8, 9)
    request = Request(index=0, id="r", prompt_token_ids=ids, params=params, prompt_text=prompt_text)
    seq = Sequence(request, tokenizer=Letters())
    seq.append(1)
    done = seq.completion()
    assert (done.text, done.prompt_text, done.token_ids) == (f"{expected}b", expected, [1])


def test_the_stop_reason_is_the_text_or_id_that_the_request_named():
    reasons = []
    for eos, params, token in (
        ((5,), {}, 5),
        ((), {"stop_token_ids": [5]}, 5),
        ((), {"stop": ["bc", "b"]}, 1),
        ((), {}, 1),
    ):
        request = Request(
            index=0,
            id="r",
            prompt_token_ids=[3],
            params=SamplingParams(max_new_tokens=1, **params),
        )
        seq = Sequence(request, tokenizer=Letters(), eos_token_ids=eos)
        seq.append(token)
        reasons.append(seq.completion().stop_reason)
    assert reasons == [None, 5, "b", None]


def stopped_at(stop: list[str], tokens: list[int], min_tokens: int) -> tuple[int, str]:
    """Return how many tokens a request has when a stop text ends it, and its text."""
    params = SamplingParams(max_new_tokens=20, stop=stop, min_tokens=min_tokens)
    request = Request(index=0, id="r", prompt_token_ids=[3], params=params)
    seq = Sequence(request, tokenizer=Letters())
    for token in tokens:
        if seq.finish_reason is None:
            seq.append(token)
    return seq.num_generated, seq.text


@pytest.mark.parametrize(
    ("stop", "min_tokens", "expected"),
    [
        (["b"], 0, (2, "a")),
        (["b"], 2, (5, "abca")),
        (["b"], 4, (5, "abca")),
        (["bc"], 2, (3, "a")),  # completed by the third token
        (["bc"], 3, (6, "abca")),
        (["a", "bc"], 5, (6, "abca")),
    ],
)
def test_a_stop_text_ends_nothing_within_the_minimum_number_of_tokens(stop, min_tokens, expected):
    assert stopped_at(stop, [0, 1, 2, 0, 1, 2], min_tokens) == expected


def group_of(eos=()) -> tuple[ChoiceGroup, list[Sequence]]:
    params = SamplingParams(max_new_tokens=2, n=2)
    line = Request.of_line(4, "r", [[7, 8], [9]], params)
    sequences = [Sequence(each, eos_token_ids=eos) for each in line.choices]
    return ChoiceGroup(sequences), sequences


def test_the_choices_of_a_line_are_one_record_in_their_order_when_the_last_has_finished():
    group, sequences = group_of(eos={0})
    whole = []
    for token, each in enumerate(reversed(sequences)):
        each.append(token)
        if each.finish_reason is None:
            each.append(token)
        whole.append(group.finish(each))
    assert whole == [False, False, False, True]
    record = group.completion().record()
    assert [each["token_ids"] for each in record["choices"]] == [[3, 3], [2, 2], [1, 1], [0]]
    assert [each["finish_reason"] for each in record["choices"]] == ["length"] * 3 + ["stop"]
    assert [each["index"] for each in record["choices"]] == [0, 1, 2, 3]
    assert record["usage"] == {"prompt_tokens": 3, "completion_tokens": 7}
    assert "text" not in record


def test_a_line_with_a_choice_that_fails_is_an_error_record_that_names_it():
    group, sequences = group_of()
    sequences[2].finish("error", RequestError("non_finite_logits", "bad"))
    group.finish(sequences[2])
    for each in group.unfinished():
        each.finish("error", RequestError("non_finite_logits", "bad"))
        group.finish(each)
    record = group.completion().record()
    assert record["error"]["code"] == "non_finite_logits"
    assert record["error"]["message"] == "choice 2: bad"
    assert (record["finish_reason"], record["token_ids"]) == ("error", [])
