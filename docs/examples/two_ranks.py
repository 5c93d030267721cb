"""The same completions on two ranks: each holds half of every layer's experts.

torchrun --nproc-per-node 2 docs/examples/two_ranks.py

Every rank runs this file, makes one LLM and calls the same methods in the same order. `generate`
returns all completions on every rank.
"""

from engine import LLM, SamplingParams, load_config

PROMPTS = ["sum: 47 + 38 =", "copy: ball water wave town =>"]


def main() -> None:
    """Join the launcher's ranks, complete two prompts, print them on rank 0."""
    llm = LLM(load_config("tiny_mixtral_ep2", ["runtime.device=cpu"]))
    completions = llm.generate(PROMPTS, SamplingParams(max_new_tokens=12))
    if llm.topology.world.rank == 0:
        print(f"{llm.topology.expert.size} ranks share the experts")
        for completion in completions:
            print(f"{PROMPTS[completion.index]}{completion.text}")
    llm.close()


if __name__ == "__main__":
    main()
