"""One rank of a job that records spans and routing for tools/bench_simulate.py."""

from __future__ import annotations

import json
import random
import sys

from engine.config.loader import load_config
from engine.llm import LLM
from engine.reporting import open_exporters
from engine.request import SamplingParams


def main(job: dict[str, object]) -> None:
    """Complete prompts of one token each, whose steps are all prefill."""
    open_exporters.CLAIMS_EVERY = 1
    llm = LLM(load_config(str(job["config"]), [str(each) for each in job["settings"]]))  # type: ignore[attr-defined]
    draw = random.Random(int(job["seed"]))  # type: ignore[call-overload]
    prompts = [
        [draw.randrange(4, 2000) for _ in range(length)]
        for length in job["lengths"]  # type: ignore[attr-defined]
    ]
    llm.generate(prompts, SamplingParams(max_new_tokens=1, ignore_eos=True))
    llm.close()
    print("{}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
