"""Text from tokens, and stops. Run: pytest tests/unit/generation/test_detokenizer.py

Two small tokenizers made here stand for the two kinds in use: bytes as tokens (byte-level BPE), and
pieces with a leading-space mark and byte fallback (SentencePiece).
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.generation.detokenizer import Detokenizer, StopChecker, load_eos_token_ids
from engine.request import SamplingParams


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("l", "l")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    words = ["<unk>", "▁", "▁hello", "▁world", "lo", "▁x", "!"]
    vocab = {word: i for i, word in enumerate(words)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


BYTES, PIECES = byte_level(), sentence_piece()


def ids(text: str) -> list[int]:
    return BYTES.encode(text).ids


def pieces(*words: str) -> list[int]:
    return [PIECES.token_to_id(word) for word in words]


def run(params: SamplingParams, tokens: list[int], **kwargs) -> tuple[list[str | None], str]:
    """Every outcome up to the first that ends it, and the text."""
    checker = StopChecker(params, tokenizer=BYTES, **kwargs)
    outcomes: list[str | None] = []
    for place, token in enumerate(tokens):
        outcomes.append(checker.check(token, full=place + 1 == params.max_new_tokens))
        if outcomes[-1]:
            break
    return outcomes, checker.text


# --- text -------------------------------------------------------------------------------------


@given(st.text(max_size=40), st.integers(0, 8), st.randoms())
def test_pieces_are_whole_characters_and_join_to_the_text(text, cut, random):
    tokens = ids(text)
    detokenizer = Detokenizer(BYTES, ids("prompt"))
    read = []
    for token in tokens:
        detokenizer.append(token)
        if random.random() < 0.7:
            read.append(detokenizer.read())
    read.append(detokenizer.read())
    assert "".join(read) + detokenizer.held() == detokenizer.text
    if "\ufffd" not in text:
        assert "\ufffd" not in detokenizer.text
        assert detokenizer.text == text


def test_a_character_of_four_tokens_appears_with_its_last_one():
    detokenizer = Detokenizer(BYTES)
    read = []
    for token in ids("a🙂b"):
        detokenizer.append(token)
        read.append(detokenizer.read())
    assert read == ["a", "", "", "", "🙂", "b"]


def test_an_incomplete_character_at_the_end_is_left_out():
    detokenizer = Detokenizer(BYTES)
    for token in ids("né🙂")[:-1]:
        detokenizer.append(token)
        assert "\ufffd" not in detokenizer.text
    assert detokenizer.text == "né"


def test_a_prompt_that_ends_inside_a_character_leaves_the_whole_of_it_to_the_completion():
    tokens = ids("xé!")
    detokenizer = Detokenizer(BYTES, tokens[:2])
    for token in tokens[2:]:
        detokenizer.append(token)
    assert detokenizer.read() == "é!"


def test_bytes_that_never_form_a_character_are_released_in_the_end():
    detokenizer = Detokenizer(BYTES)
    bad = ids("é")[0]
    for token in [bad] * 200 + ids("ok"):
        detokenizer.append(token)
        detokenizer.read()
        assert len(detokenizer._window) < 140  # the cost of a token stays bounded
    assert detokenizer.text.endswith("ok")
    assert set(detokenizer.text[:-2]) == {"\ufffd"}


@pytest.mark.parametrize("at_once", [True, False])
def test_leading_spaces_follow_the_prompt(at_once):
    detokenizer = Detokenizer(PIECES, pieces("▁hello"))
    for token in pieces("▁world", "<0xE2>", "<0x98>", "<0x83>", "▁x", "lo", "<eos>", "▁x", "!"):
        detokenizer.append(token)
        if not at_once:
            detokenizer.read()
    assert detokenizer.text == " world☃ xlo x!"


def test_a_long_run_of_special_tokens_has_no_text_and_keeps_the_window_short():
    detokenizer = Detokenizer(PIECES, pieces("▁hello"))
    for token in pieces("▁world") + pieces("<eos>") * 500 + pieces("▁x"):
        detokenizer.append(token)
        detokenizer.read()
        assert len(detokenizer._window) <= 6
    assert detokenizer.text == " world x"


def test_reading_text_early_changes_nothing():
    detokenizer = Detokenizer(BYTES)
    seen = []
    for token in ids("é🙂the"):
        detokenizer.append(token)
        seen.append(detokenizer.text)
    assert seen == ["", "é", "é", "é", "é", "é🙂", "é🙂the"]


# --- ends -------------------------------------------------------------------------------------


def test_a_stop_string_is_found_across_tokens_and_cut_off():
    tokens = ids("one\nQ: two")
    outcomes, text = run(SamplingParams(stop=("\nQ:",)), tokens)
    assert outcomes == [None] * (len(ids("one\nQ:")) - 1) + ["stop"]
    assert text == "one"


def test_a_stop_string_inside_one_token_is_cut_off_too():
    outcomes, text = run(SamplingParams(stop=("h",)), ids("a the"))
    assert (outcomes, text) == ([None, "stop"], "a t")


def test_the_earliest_of_several_stop_strings_cuts():
    _, text = run(SamplingParams(stop=("e", "th", "zzz")), ids("ll the"))
    assert text == "ll "


def test_a_stop_string_that_only_nearly_matches_does_not_stop():
    outcomes, text = run(SamplingParams(stop=("aab",), max_new_tokens=5), ids("aaaac"))
    assert (outcomes[-1], text) == ("length", "aaaac")


def test_a_stop_string_of_split_characters_is_found():
    outcomes, text = run(SamplingParams(stop=("é🙂",)), ids("naé🙂é"))
    assert outcomes[-1] == "stop"
    assert len(outcomes) == len(ids("naé🙂"))
    assert text == "na"


STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.text(alphabet="abé🙂", min_size=1, max_size=30), STOPS)
def test_generation_ends_with_the_first_character_that_completes_a_stop_string(text, stops):
    tokens = ids(text)
    outcomes, got = run(SamplingParams(stop=tuple(stops), max_new_tokens=len(tokens)), tokens)
    prefixes = [text[: end + 1] for end in range(len(text))]
    stopped = next((p for p in prefixes if any(stop in p for stop in stops)), None)
    if stopped is None:
        assert (outcomes[-1], got) == ("length", text)
    else:
        assert (outcomes[-1], len(outcomes)) == ("stop", len(ids(stopped)))
        assert got == stopped[: min(stopped.find(stop) for stop in stops if stop in stopped)]


def test_the_stop_token_has_no_text_and_eos_can_be_ignored():
    tokens = [*ids("a"), *ids("the"), *ids("b")]
    stop_id = ids("the")[0]
    assert run(SamplingParams(stop_token_ids=(stop_id,)), tokens) == ([None, "stop"], "a")
    assert run(SamplingParams(), tokens, eos_token_ids={stop_id}) == ([None, "stop"], "a")
    ignoring = SamplingParams(ignore_eos=True, max_new_tokens=3)
    assert run(ignoring, tokens, eos_token_ids={stop_id}) == ([None, None, "length"], "atheb")
    asked = SamplingParams(ignore_eos=True, stop_token_ids=(stop_id,))
    assert run(asked, tokens, eos_token_ids={stop_id})[0] == [None, "stop"]


def test_a_stop_string_held_back_with_an_incomplete_character_counts_at_the_end():
    # A token that ends one character and begins the next holds both back.
    class Joined:
        def decode(self, ids, /, *, skip_special_tokens):
            return "".join({0: "x", 1: ".\ufffd"}[i] for i in ids)

    checker = StopChecker(SamplingParams(stop=(".",)), tokenizer=Joined())
    assert checker.check(0, full=False) is None
    assert checker.check(1, full=True) == "stop"
    assert checker.text == "x"


def test_without_a_tokenizer_text_is_empty_and_stop_strings_are_refused():
    checker = StopChecker(SamplingParams(), eos_token_ids={2})
    assert checker.check(1, full=False) is None
    assert checker.check(2, full=False) == "stop"
    assert checker.text == ""
    with pytest.raises(ValueError, match=r"stop = \['x'\].*use stop_token_ids"):
        StopChecker(SamplingParams(stop=("x",)))


EOS = BYTES.token_to_id("<eos>")


def test_a_stop_text_that_is_a_special_token_stops_by_its_id():
    tokens = [*ids("the"), EOS, *ids("b")]
    assert run(SamplingParams(stop=("<eos>",)), tokens) == ([None, "stop"], "the")
    ignoring = SamplingParams(stop=("zzz", "<eos>"), ignore_eos=True)
    assert run(ignoring, tokens, eos_token_ids={EOS}) == ([None, "stop"], "the")
    # Spelled in ordinary tokens it is text, and stops as before.
    assert run(SamplingParams(stop=("<eos>",)), ids("a<") + ids("eos>b"))[1] == "a"


@pytest.mark.parametrize(
    ("stop", "tokens", "num_tokens", "text"),
    [
        ("<eos>\n", [*ids("th"), EOS, *ids("\nQ")], 3, "th"),
        ("e<eos>", [*ids("the"), EOS, *ids("b")], 2, "th"),
        ("<eos><eos>", [*ids("a"), EOS, *ids("b"), EOS, EOS], 5, "ab"),
        ("<eos>\n", [*ids("a"), EOS, *ids("b\n")], None, "ab\n"),
        ("b", [*ids("a"), EOS, *ids("b")], 3, "a"),
        ("ab", [*ids("a"), EOS, *ids("b")], 3, ""),
    ],
)
def test_a_stop_text_that_contains_a_special_token_is_found(stop, tokens, num_tokens, text):
    outcomes, got = run(SamplingParams(stop=(stop,)), tokens)
    assert got == text
    if num_tokens is None:
        assert outcomes == [None] * len(tokens)
    else:
        assert outcomes == [None] * (num_tokens - 1) + ["stop"]


def test_a_special_token_as_stop_text_works_with_every_kind_of_tokenizer():
    from transformers import PreTrainedTokenizerFast

    class Slow:  # written in Python, as transformers has some: no Rust tokenizer inside
        all_special_tokens = ("<eos>",)

        def convert_tokens_to_ids(self, token):
            return {"<eos>": 1}[token]

        def decode(self, ids, /, *, skip_special_tokens):
            return "x" * sum(i != 1 for i in ids)

    fast = PreTrainedTokenizerFast(tokenizer_object=BYTES, additional_special_tokens=["<end>"])
    for tokenizer, stop, stop_id in ((Slow(), "<eos>", 1), (fast, "<end>", len(fast) - 1)):
        checker = StopChecker(SamplingParams(stop=(stop,)), tokenizer=tokenizer)
        assert checker.check(0, full=False) is None
        assert checker.check(stop_id, full=False) == "stop"
    assert fast.convert_tokens_to_ids("<end>") == len(fast) - 1


def test_a_transformers_tokenizer_gives_the_same_text():
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=BYTES, eos_token="<eos>")
    text = "the 🙂 , ok . n't"
    detokenizer = Detokenizer(wrapped)
    for token in ids(text):
        detokenizer.append(token)
    assert detokenizer.text == text


# --- ends of text that a checkpoint names -------------------------------------------------------


def test_eos_ids_come_from_generation_config_then_config_and_from_the_tokenizer(tmp_path):
    class WithEos:
        eos_token_id = 9

    assert load_eos_token_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert load_eos_token_ids(tmp_path) == {1}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert load_eos_token_ids(tmp_path) == {2, 3}
    assert load_eos_token_ids(tmp_path, WithEos()) == {2, 3, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert load_eos_token_ids(tmp_path) == {1}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[]", "must hold one JSON object, and holds a list"),
        (b"{", "is not valid JSON .*, as if cut off; download or copy it again"),
        (b'{"a": "\xff"}', "is not UTF-8 .byte 7 is 0xff"),
        (b"", "is empty; download"),
        (b'{"eos_token_id": "</s>"}', ": eos_token_id = '</s>': must be a token id"),
        (b'{"eos_token_id": [2, null]}', ": eos_token_id = .2, None.: must be a token id"),
        (b'{"eos_token_id": true}', ": eos_token_id = True: must be a token id"),
    ],
)
def test_a_bad_generation_config_is_named(tmp_path, content, text):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"generation_config.json ?{text}"):
        load_eos_token_ids(tmp_path)
