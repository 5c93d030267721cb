"""A transformers model on two ranks whose experts run on Lockstep's dispatch, under a capacity.

torchrun --nproc-per-node 2 docs/examples/in_transformers.py

Every rank runs this file. The experts are this package's, all else is transformers'.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

from engine.config import CapacityConfig, MoEConfig
from engine.interop.transformers_ep import register

CHECKPOINT = Path(__file__).resolve().parents[2] / "configs" / "checkpoints" / "tiny_mixtral"
PROMPT = "copy: ball water wave town =>"


def main() -> None:
    """Complete a prompt and print what capacity dropped of the first rank's part."""
    capacity = CapacityConfig(policy="token_drop", factor="1.25")  # the keys of moe.capacity
    experts = register(MoEConfig(capacity=capacity))  # before from_pretrained, alike on every rank

    ranks = int(os.environ["WORLD_SIZE"])
    spread = DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation="lockstep")
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, distributed_config=spread
    )
    experts.follow(model)  # the prompt is subject to capacity, new tokens are not
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    if dist.get_rank() == 0:
        print(tokenizer.decode(tokens, skip_special_tokens=True))
        print(experts.drops)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
