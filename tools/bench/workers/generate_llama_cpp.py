"""Worker: llama.cpp by `llama-cpp-python`, its batched decoding on a GGUF of the same weights.

A bench checkpoint of Mixtral is written to a temporary GGUF (PyPI `gguf`) whose matrices are
quantised; the router and the norms stay in float32. All prompts are sequences of one context.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.protocol import memory_mib, serve

_UBATCH = 512  # llama.cpp's default: tokens that it computes at once


class Worker:
    """Holds the model between requests."""

    def load(self, checkpoint: str, threads: int, kind: str) -> dict[str, Any]:
        """Load the model.

        Args:
            kind: type of the matrices as llama.cpp calls it, such as q8_0 or q4_0.
        """
        import llama_cpp  # pyright: ignore[reportMissingImports]
        import numpy as np

        before = memory_mib()
        self._api, self._threads = llama_cpp, threads
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            self._vocabulary = write_gguf(Path(checkpoint), path, kind)
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers = 0
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {checkpoint} as {kind}")
        return {
            "versions": {"llama-cpp-python": llama_cpp.__version__, "numpy": np.__version__},
            "idle": before,
        }

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Continue every prompt greedily by `new_tokens`; return seconds from lists to lists."""
        api, count = self._api, len(prompts)
        params = api.llama_context_default_params()
        params.n_ctx = sum(len(prompt) + new_tokens for prompt in prompts)
        params.kv_unified = True
        params.n_seq_max, params.n_batch, params.n_ubatch = count, 2048, _UBATCH
        params.n_threads = params.n_threads_batch = self._threads
        context = api.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError(f"llama.cpp cannot hold {params.n_ctx} tokens of {count} sequences")
        batch = api.llama_batch_init(params.n_batch, 0, 1)
        begin = time.perf_counter()
        rows = [
            (token, place, which, place == len(prompt) - 1)
            for which, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        for step in range(new_tokens):
            for start in range(0, len(rows), params.n_batch):
                self._decode(context, batch, rows[start : start + params.n_batch], tokens)
            rows = [
                (new[-1], len(prompt) + step, which, True)
                for which, (prompt, new) in enumerate(zip(prompts, tokens, strict=True))
            ]
        seconds = time.perf_counter() - begin
        api.llama_batch_free(batch)
        api.llama_free(context)
        return {"seconds": seconds, "tokens": tokens, **memory_mib()}

    def _decode(
        self,
        context: Any,
        batch: Any,
        rows: list[tuple[int, int, int, bool]],
        tokens: list[list[int]],
    ) -> None:
        """Run rows (token, position, sequence, is read); append the likeliest tokens of those."""
        import numpy as np

        batch.n_tokens = len(rows)
        for row, (token, position, which, is_read) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, which
            batch.logits[row] = is_read
        if code := self._api.llama_decode(context, batch):
            raise ValueError(f"llama_decode returned {code}")
        for row, (_, _, which, is_read) in enumerate(rows):
            if is_read:
                logits = self._api.llama_get_logits_ith(context, row)
                tokens[which].append(
                    int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
                )


def write_gguf(checkpoint: Path, path: Path, kind: str) -> int:
    """Write a Mixtral checkpoint as GGUF; return the size of its vocabulary."""
    import gguf  # pyright: ignore[reportMissingImports]
    import numpy as np
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, Any] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "np") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    experts = range(config["num_local_experts"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"] or hidden // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(len(experts))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, value: Any, *, keep: bool = False) -> None:
        value = np.ascontiguousarray(value, dtype=np.float32)
        form = gguf.GGMLQuantizationType[kind.upper()]
        if keep or value.ndim == 1:
            writer.add_tensor(f"{name}.weight", value)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(value, form), raw_dtype=form)

    def halves(value: Any, count: int) -> Any:
        """Sort the rows of each head as llama.cpp rotates them: pairs are neighbours."""
        return value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)

    add("token_embd", tensors["model.embed_tokens.weight"])
    add("output_norm", tensors["model.norm.weight"])
    add("output", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        own, block = f"model.layers.{layer}", f"blk.{layer}"
        attention, moe = f"{own}.self_attn", f"{own}.block_sparse_moe"
        add(f"{block}.attn_norm", tensors[f"{own}.input_layernorm.weight"])
        add(f"{block}.ffn_norm", tensors[f"{own}.post_attention_layernorm.weight"])
        add(f"{block}.attn_q", halves(tensors[f"{attention}.q_proj.weight"], heads))
        add(f"{block}.attn_k", halves(tensors[f"{attention}.k_proj.weight"], kv_heads))
        add(f"{block}.attn_v", tensors[f"{attention}.v_proj.weight"])
        add(f"{block}.attn_output", tensors[f"{attention}.o_proj.weight"])
        add(f"{block}.ffn_gate_inp", tensors[f"{moe}.gate.weight"], keep=True)
        for theirs, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            each = [tensors[f"{moe}.experts.{expert}.{name}.weight"] for expert in experts]
            add(f"{block}.ffn_{theirs}_exps", np.stack(each))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return vocabulary


if __name__ == "__main__":
    serve(Worker())
