"""The tiny checkpoints' tasks, corpus and batches. Run: pytest tests/tools/test_tiny_tasks.py

Answers are checked by other means than the ones that made them: a dictionary built from the
prompt, int(), removal of matched pairs, string slicing.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import corpus, evaluate, export, tasks
from tiny.arch import ARCHS
from tiny.data import ANSWER_WEIGHT, FILLER_WEIGHT, Batches, record_tokens
from tiny.model import TinyMoe
from transformers import MixtralForCausalLM, OlmoeForCausalLM

NUM_DRAWS = 300


def draws(task: str) -> list[tasks.Record]:
    rng = random.Random(7)
    return [tasks.TASKS[task](rng) for _ in range(NUM_DRAWS)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library: modules, tests that must not be read, one file in another encoding."""
    root = tmp_path_factory.mktemp("library")
    for index in range(60):
        words = " ".join(tasks.WORDS[index : index + 90])
        (root / f"module_{index}.py").write_text(f'"""{words}."""\nvalue = {index}\n')
    (root / "test").mkdir()
    (root / "test" / "test_a.py").write_text("never = 'read'\n")
    (root / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    return root


@pytest.fixture(scope="module")
def tokenizer(library: Path):
    documents = [*corpus.load_corpus(library).train, *[" ".join(tasks.WORDS)] * 20]
    return corpus.train_tokenizer(documents, max_length=128)


def test_recall_answer_is_the_second_word_of_the_pair_asked_for():
    rng = random.Random(7)
    for repeats in (False, True):
        for _ in range(NUM_DRAWS):
            record = tasks.make_recall(rng, repeats=repeats)
            shown, _, key = record.prompt.removeprefix("recall: ").partition("? ")
            pairs = dict(pair.split() for pair in shown.split(", "))
            assert record.answer == f" {pairs[key]}"
            assert 5 <= len(pairs) <= 12


def test_recall_marks_exactly_the_repeated_values_as_known():
    rng = random.Random(3)
    for _ in range(NUM_DRAWS):
        record = tasks.make_recall(rng, repeats=True)
        shown = record.prompt.removeprefix("recall: ").partition("?")[0].split(", ")
        first_seen = list(dict.fromkeys(shown))
        marked = [record.prompt[start:end].strip() for start, end in record.known]
        assert marked == [pair.split()[1] for pair in shown[len(first_seen) :]]
    assert tasks.make_recall(rng).known == ()


def test_sum_answer_is_the_sum():
    for record in draws("sum"):
        left, right = record.prompt.removeprefix("sum: ").removesuffix(" =").split(" + ")
        assert int(record.answer) == int(left) + int(right)
        assert record.answer[0] == " "


def test_brackets_answer_closes_everything_and_nothing_more():
    for record in draws("brackets"):
        text = record.prompt.removeprefix("brackets: ").removesuffix(" =>") + record.answer
        text = text.replace(" ", "")
        while True:
            shorter = text
            for pair in ("()", "[]", "{}", "<>"):
                shorter = shorter.replace(pair, "")
            if shorter == text:
                break
            text = shorter
        assert text == ""
        assert 1 <= len(record.answer.split()) <= 6


def test_copy_answer_is_the_words_between_colon_and_arrow():
    for record in draws("copy"):
        assert record.answer == record.prompt[len("copy:") : -len(" =>")]
        assert set(record.answer.split()) <= set(tasks.WORDS)


def test_training_never_draws_an_evaluation_prompt():
    rng = random.Random(0)
    trained = {tasks.sample_train_record(rng, tasks.TRAIN_SHARES).prompt for _ in range(4000)}
    evaluated = {record.prompt for record in tasks.evaluation_records(50, seed=0)}
    assert len(evaluated) == 50 * len(tasks.TASKS)
    assert not trained & evaluated


def test_evaluation_records_repeat_for_a_seed_and_change_with_it():
    assert tasks.evaluation_records(20, seed=0) == tasks.evaluation_records(20, seed=0)
    assert tasks.evaluation_records(20, seed=0) != tasks.evaluation_records(20, seed=1)


def test_corpus_is_the_same_whatever_order_the_files_were_written_in(library: Path, tmp_path: Path):
    for path in sorted(library.glob("*.py"), reverse=True):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, second = corpus.load_corpus(library), corpus.load_corpus(tmp_path)
    assert first == second
    assert "never" not in "".join(first.train + first.validation)
    assert "caf" not in "".join(first.train + first.validation)


def test_corpus_splits_by_file_name_alone(library: Path):
    text = corpus.load_corpus(library)
    held_out = [i for i in range(60) if corpus.is_validation(f"module_{i}.py")]
    assert len(text.validation) == len(held_out) > 0
    assert all(f"value = {i}\n" in "".join(text.validation) for i in held_out)


def test_tokenizer_round_trips_and_keeps_digits_apart(tokenizer):
    text = "sum: 47 + 38 = 85\n\tdéjà  vu { x }\r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == corpus.BOS_ID
    assert tokenizer.decode(ids[1:]) == text
    digits = tokenizer("4738", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in digits] == ["4", "7", "3", "8"]


def test_chat_template_gives_a_task_prompt_the_tokens_of_plain_text(tokenizer):
    messages = [{"role": "user", "content": "sum: 1 + 2 ="}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == (tokenizer("sum: 1 + 2 =")["input_ids"])
    )


def test_prompt_and_answer_tokenize_apart_as_they_do_together(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        record = tasks.sample_train_record(rng, tasks.TRAIN_SHARES)
        apart = (
            tokenizer(record.prompt)["input_ids"]
            + (tokenizer(record.answer, add_special_tokens=False)["input_ids"])
        )
        assert tokenizer(record.prompt + record.answer)["input_ids"] == apart


def test_answers_weigh_more_than_the_random_words_of_a_prompt(tokenizer):
    record = tasks.Record(task="sum", prompt="sum: 1 + 2 =", answer=" 3")
    [(ids, weights)] = record_tokens(tokenizer, [record])
    assert ids[-1] == corpus.EOS_ID
    assert weights[-2:] == [ANSWER_WEIGHT, ANSWER_WEIGHT]
    assert set(weights[:-2]) == {FILLER_WEIGHT}


def test_batch_of_a_step_does_not_depend_on_the_steps_before(tokenizer, library: Path):
    stream = corpus.encode_documents(tokenizer, corpus.load_corpus(library).train)
    assert stream[0] == corpus.BOS_ID and stream[-1] == corpus.EOS_ID
    shape = {"num_rows": 4, "length": 64, "num_task_rows": 2, "task_shares": tasks.TRAIN_SHARES}
    used = Batches(tokenizer, stream, seed=5)
    used.batch(0, **shape)
    for first, second in zip(
        used.batch(9, **shape), Batches(tokenizer, stream, seed=5).batch(9, **shape), strict=True
    ):
        assert torch.equal(first, second)
    ids_BS, targets_BS, weights_BS = used.batch(9, **shape)
    assert torch.equal(ids_BS[:, 1:], targets_BS[:, :-1])
    assert bool((weights_BS[2:] == 1).all())


def test_batch_draws_tasks_by_the_shares_it_is_given(tokenizer, library: Path):
    stream = corpus.encode_documents(tokenizer, corpus.load_corpus(library).train)
    batches = Batches(tokenizer, stream, seed=5)
    shape = {"num_rows": 2, "length": 256, "num_task_rows": 2}
    for shares, absent in (({"sum": 1.0}, "recall"), ({"recall": 1.0, "sum": 0.0}, "sum")):
        ids_BS, _, _ = batches.batch(3, **shape, task_shares=shares)
        text = tokenizer.decode(ids_BS.flatten())
        assert f"{next(iter(shares))}:" in text
        assert f"{absent}:" not in text


def test_text_chunks_lose_no_line_and_fit_the_context(tokenizer):
    document = "".join(f"line {i} = {i * i}\n" for i in range(200))
    chunks = evaluate.text_chunks(tokenizer, [document], max_tokens=64)
    assert "".join(chunks) == document
    assert max(len(ids) for ids in tokenizer(chunks)["input_ids"]) <= 64


def test_unigram_entropy_of_two_equally_frequent_tokens_is_log_two(tokenizer):
    assert evaluate.unigram_entropy(tokenizer, ["4747"]) == pytest.approx(np.log(2))


def test_task_accuracy_counts_only_answers_right_to_the_last_token(tokenizer):
    records = [tasks.Record(task="sum", prompt="sum: 1 + 2 =", answer=" 3")]
    right = tokenizer("sum: 1 + 2 = 3")["input_ids"] + [corpus.EOS_ID]

    def oracle(ids_1S: torch.Tensor, last: int) -> torch.Tensor:
        targets = torch.tensor([*right[1:-1], last])[: ids_1S.shape[1]]
        return torch.nn.functional.one_hot(targets, corpus.VOCAB_SIZE)[None].float()

    exact = evaluate.task_accuracy(lambda ids: oracle(ids, corpus.EOS_ID), tokenizer, records)
    endless = evaluate.task_accuracy(lambda ids: oracle(ids, right[-2]), tokenizer, records)
    assert (exact, endless) == ({"sum": 1.0}, {"sum": 0.0})


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_training_step_in_bfloat16_stays_near_float32(name: str):
    model = TinyMoe(ARCHS[name], seed=0)
    ids_BS = torch.randint(
        0, corpus.VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0)
    )
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, _, loads_LE = model(ids_BS)
        assert loads_LE.sum(dim=1).tolist() == [32 * model.arch.top_k] * model.arch.num_layers
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids_BS.flatten())
        loss.backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    similarity = torch.nn.functional.cosine_similarity(*grads, dim=0)
    assert similarity > 0.97


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_training_module_gives_the_logits_of_transformers_own_family(name: str):
    arch = replace(ARCHS[name], vocab_size=61, hidden_size=32, num_heads=4, num_layers=2)
    arch = replace(arch, num_kv_heads=arch.num_kv_heads // 2)
    family = {"mixtral": MixtralForCausalLM, "olmoe": OlmoeForCausalLM}[name]
    exported = family(export.hugging_face_config(arch)).eval()
    exported.load_state_dict(TinyMoe(arch, seed=3).state_dict())
    ids_BS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    assert export.logits_error(TinyMoe(arch, seed=4), exported, ids_BS) < 1e-5


def test_logits_of_another_rule_are_refused():
    arch = replace(ARCHS["olmoe"], vocab_size=61, hidden_size=32, num_layers=1)
    exported = OlmoeForCausalLM(export.hugging_face_config(arch)).eval()
    renormalising = TinyMoe(replace(arch, norm_topk_prob=True), seed=0)
    with pytest.raises(ValueError, match="exported logits differ"):
        export.logits_error(renormalising, exported, torch.arange(20)[None])
