"""Completions from Python, on one rank.

python docs/examples/offline.py
"""

from engine import LLM, SamplingParams, load_config

PROMPTS = ["sum: 47 + 38 =", "copy: ball water wave town =>"]


def main() -> None:
    """Load the bundled model and complete two prompts."""
    llm = LLM(load_config("tiny_mixtral", ["runtime.device=cpu"]))
    for completion in llm.generate(PROMPTS, SamplingParams(max_new_tokens=12)):
        print(f"{PROMPTS[completion.index]}{completion.text}   [{completion.finish_reason}]")
    llm.close()


if __name__ == "__main__":
    main()
