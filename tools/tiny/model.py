"""The training-side model: Mixtral and OLMoE in one module, with Hugging Face's parameter names.

Used by tools/train_tiny.py only. `state_dict()` loads into MixtralForCausalLM or OlmoeForCausalLM
as it is, and the export checks that both give the same logits.

Shapes: T tokens of the batch, D model dim, B sequences, S tokens a sequence, H heads, d head dim,
E experts, V vocabulary.
"""

from __future__ import annotations

import torch
from tiny.arch import TinyArch
from tiny.backward import RMSNormFunction
from tiny.moe import MoE
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]; the dtype is kept."""
        out = RMSNormFunction.apply(x, self.weight.to(x.dtype), self.eps)
        assert isinstance(out, Tensor)
        return out


def rope_tables(arch: TinyArch, num_positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32 [num_positions, head_dim], in GPT-NeoX layout."""
    head_dim = arch.hidden_size // arch.num_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(num_positions).float(), arch.rope_theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotate the two halves of every head by its position's angles."""
    first, second = x_BHSd.chunk(2, dim=-1)
    return x_BHSd * cos_Sd + torch.cat([-second, first], dim=-1) * sin_Sd


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return causal attention, [B, H, S, d]; in bfloat16 by plain products.

    torch's fused CPU kernel is the exact one and serves float32; its bfloat16 backward takes twice
    as long as the products it replaces, which matters more than the memory of S x S scores here.
    """
    if query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    length, head_dim = query.shape[-2:]
    mask_SS = torch.full((length, length), -1e4, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(mask_SS, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=head_dim**-0.5)
    return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view_as(query)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        self.arch = arch
        self.head_dim = arch.hidden_size // arch.num_heads
        kv_size = arch.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, arch.hidden_size, bias=False)
        self.k_proj = nn.Linear(arch.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(arch.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(arch.hidden_size, arch.hidden_size, bias=False)
        if arch.qk_norm:
            self.q_norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
            self.k_norm = RMSNorm(kv_size, arch.rms_norm_eps)

    def forward(self, x_BSD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
        """Attend within every sequence: [B, S, D] to [B, S, D]."""
        num_sequences, length, _ = x_BSD.shape
        query, key, value = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.arch.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            y.view(num_sequences, length, -1, self.head_dim).transpose(1, 2)
            for y in (query, key, value)
        )
        cos_Sd, sin_Sd = cos_Sd.to(query.dtype), sin_Sd.to(query.dtype)
        query, key = apply_rope(query, cos_Sd, sin_Sd), apply_rope(key, cos_Sd, sin_Sd)
        if (groups := self.arch.num_heads // self.arch.num_kv_heads) > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = causal_attention(query, key, value)
        return self.o_proj(mixed.transpose(1, 2).reshape(num_sequences, length, -1))


class Layer(nn.Module):
    """Attention, then the MoE, each on the normalised residual stream."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.self_attn = Attention(arch)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.mlp = MoE(arch)

    def forward(
        self, x_BSD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new residual stream [B, S, D] and the MoE's balance loss and load."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_Sd, sin_Sd)
        y_TD, balance, load_E = self.mlp(self.post_attention_layernorm(x_BSD).flatten(0, 1))
        return x_BSD + y_TD.view_as(x_BSD), balance, load_E


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Layer(arch) for _ in range(arch.num_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)


class TinyMoe(nn.Module):
    """The whole language model; parameter names are those of Hugging Face's classes."""

    def __init__(self, arch: TinyArch, seed: int) -> None:
        super().__init__()
        self.arch = arch
        self.model = Decoder(arch)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        self._init_weights(torch.Generator().manual_seed(seed))

    def _init_weights(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                # Unit gains cap a logit of 32-wide heads near sqrt(32): too blunt to attend to one
                # position, and neither copying nor recall was learned in 2000 steps.
                if "q_norm" in name or "k_norm" in name:
                    nn.init.constant_(parameter, self.arch.qk_norm_init)
                continue
            std = 0.02 if "embed" in name or "gate.weight" in name else parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj", "lm_head.weight")):
                std *= 0.3  # the residual stream starts near the embedding
            with torch.no_grad():
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, ids_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, S, V], the mean balance loss and the load int64 [layers, E]."""
        cos_Sd, sin_Sd = rope_tables(self.arch, ids_BS.shape[1])
        x_BSD = self.model.embed_tokens(ids_BS)
        if torch.is_autocast_enabled("cpu"):
            x_BSD = x_BSD.to(torch.get_autocast_dtype("cpu"))
        balances, loads = [], []
        for layer in self.model.layers:
            x_BSD, balance, load_E = layer(x_BSD, cos_Sd, sin_Sd)
            balances.append(balance)
            loads.append(load_E)
        logits = self.lm_head(self.model.norm(x_BSD))
        return logits, torch.stack(balances).mean(), torch.stack(loads)
