"""Text that every Python installation carries, and the tokenizer trained on it.

First stage of tools/train_tiny.py. The text is the standard library's own sources (code and
docstrings), in sorted order, without tests and generated tables; one file in sixteen, chosen by a
hash of its name, is held out for validation. The tokenizer is a byte-level BPE in Hugging Face
format whose digits are never merged, so a sum is spelled digit by digit.
"""

from __future__ import annotations

import hashlib
import io
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
VOCAB_SIZE = 2048
VALIDATION_ONE_IN = 16

# Tests are not prose, charmaps and lookup tables are not language, and packages installed by the
# user are not in every installation.
_SKIPPED_DIRS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# Letters, single digits, punctuation and white space never share a token.
_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents of the two splits, and a digest that names them."""

    train: list[str]
    validation: list[str]
    sha256: str


def is_validation(name: str) -> bool:
    """Return whether the file of this relative POSIX `name` is held out; pure."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_ONE_IN == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the library's Python sources under `root` (default: this interpreter's), sorted by name.

    Raises ValueError when `root` holds no readable source.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _SKIPPED_DIRS.intersection(path.relative_to(root).parts)
    )
    digest = hashlib.sha256()
    train: list[str] = []
    validation: list[str] = []
    for name in names:
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding
        if not text.strip():
            continue
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
        (validation if is_validation(name) else train).append(text)
    if not train or not validation:
        raise ValueError(
            f"corpus root {root} has {len(train)} training and {len(validation)} validation files; "
            "both must be positive: point it at a full standard library"
        )
    return Corpus(train=train, validation=validation, sha256=digest.hexdigest())


def train_tokenizer(documents: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on `documents`; it prepends BOS and carries a minimal chat template.

    `max_length` is the context length in tokens, stored as the tokenizer's model_max_length.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Concatenate the documents as token ids, int32 [tokens]: BOS, the text, EOS for each."""
    stream = io.BytesIO()
    for ids in tokenizer(documents)["input_ids"]:
        stream.write(np.asarray([*ids, EOS_ID], dtype=np.int32).tobytes())
    return np.frombuffer(stream.getvalue(), dtype=np.int32)
