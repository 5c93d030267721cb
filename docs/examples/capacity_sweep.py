"""What a capacity factor drops: one model, several factors, a table.

    python docs/examples/capacity_sweep.py
    torchrun --nproc-per-node 2 docs/examples/capacity_sweep.py

`set_capacity` changes the capacity between runs without loading the model again. A factor is the
capacity of an expert over its mean load: 1 allows no expert more than the mean.
"""

from engine import LLM, SamplingParams, load_config
from engine.config import CapacityConfig

PROMPTS = [
    "sum: 47 + 38 =",
    "copy: ball water wave town =>",
    "recall: tiger blue, apple red, moon cold? apple",
    "brackets: ( [ { } ( =>",
]
FACTORS = ("inf", "1.5", "1", "0.75", "0.5")


def main() -> None:
    """Run the same prompts under each factor."""
    llm = LLM(load_config("tiny_mixtral", ["runtime.device=cpu"]))
    rank_0 = llm.topology.world.rank == 0
    dropless: list[str] = []
    if rank_0:
        print("factor  dropped  gate mass kept  same text as dropless")
    for factor in FACTORS:
        llm.set_capacity(CapacityConfig(policy="token_drop", factor=factor))
        texts = [each.text for each in llm.generate(PROMPTS, SamplingParams(max_new_tokens=12))]
        dropless = dropless or texts  # the first factor drops nothing
        same = sum(text == other for text, other in zip(texts, dropless, strict=True))
        if rank_0 and llm.report is not None:
            totals = llm.report.totals
            kept = f"{totals.drop_rate:>7.1%}  {totals.gate_mass_kept:>14.3f}"
            print(f"{factor:>6}  {kept}  {same} of {len(texts)}")
    llm.close()


if __name__ == "__main__":
    main()
