"""Elastic runs of a model that transformers builds: restarted by torchrun, resumed from the ledger.

python -m pytest tests/cluster/test_elastic_transformers.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from bench.environment_record import REPOSITORY
from chaos.job import Job

from tests.cluster.test_elastic import NUM_REQUESTS, TIMEOUT_S, Agents, finished_by, one_node

BUNDLED = REPOSITORY / "configs" / "checkpoints" / "tiny_mixtral"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    started = Agents(tmp_path)
    yield started
    started.end()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of a GraniteMoE, a family that is not ours, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("elastic")
    torch.manual_seed(0)
    config = transformers.GraniteMoeConfig(
        vocab_size=json.loads((BUNDLED / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    transformers.GraniteMoeForCausalLM(config).save_pretrained(folder / "model")
    for name in TOKENIZER:
        shutil.copy(BUNDLED / name, folder / "model" / name)
    return Job(folder, NUM_REQUESTS, TIMEOUT_S, folder / "model")


def test_a_killed_rank_is_restarted_and_the_job_resumes(agents, job, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    agents.start(one_node(2), job.command(output))
    ranks = agents.at_work(2, output)
    os.kill(ranks[1], signal.SIGKILL)
    agents.until(lambda: not set(agents.ranks().values()) & set(ranks.values()))
    agents.until(lambda: len(agents.ranks()) == 2)
    assert agents.codes() == [0], agents.log()
    assert finished_by(output, undisturbed) == 2
