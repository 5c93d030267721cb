"""The training-side model: Mixtral and OLMoE in one module, with Hugging Face's parameter names.

Used by tools/train_tiny.py only. `state_dict()` loads into MixtralForCausalLM or OlmoeForCausalLM
as it is, and the export checks that both give the same logits. It exists because training on a
CPU needs one batched product per projection instead of a Python loop over experts.

Shapes: T tokens of the batch, D model dim, F expert hidden dim, K top-k, E experts, N = T*K
assignments, P padded rows of all experts, B sequences, S tokens a sequence, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyArch:
    """Sizes and routing rules of one tiny model."""

    model_type: str  # "mixtral" or "olmoe"
    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_hidden_size: int = 144
    norm_topk_prob: bool = True  # Mixtral divides the kept weights by their sum, OLMoE does not
    qk_norm: bool = False  # OLMoE normalises the whole query and key projections
    qk_norm_init: float = 1.7
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 512


ARCHS = {
    "mixtral": TinyArch(model_type="mixtral"),
    "olmoe": TinyArch(
        model_type="olmoe",
        num_kv_heads=8,
        num_experts=32,
        top_k=4,
        expert_hidden_size=32,
        norm_topk_prob=False,
        qk_norm=True,
    ),
}


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]; the dtype is kept."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_tables(arch: TinyArch, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [num_positions, head_dim], halves repeated (GPT-NeoX layout)."""
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
    """Causal attention, [B, H, S, d]; in bfloat16 by plain products.

    torch's fused CPU kernel is the exact one and serves float32; its bfloat16 backward takes twice
    as long as the products it replaces, which matters more than the memory of S x S scores here.
    """
    if query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    length, head_dim = query.shape[-2:]
    mask_SS = torch.full((length, length), -1e4, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(mask_SS, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=head_dim**-0.5)
    return torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).view_as(query)


class _Dispatch(torch.autograd.Function):
    """Copy tokens to their padded expert rows; the backward gathers and sums over top-k.

    Autograd's own backward is a scatter-add over unsorted rows, several times slower on a CPU.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, source_P: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, source_P)

    @staticmethod
    def backward(ctx, grad_PD: Tensor):  # type: ignore[override]
        (row_TK,) = ctx.saved_tensors
        grad_ND = grad_PD.index_select(0, row_TK.flatten())
        return grad_ND.view(*row_TK.shape, -1).sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    """Bring expert rows back to [T, K, D]; the backward leaves padding rows zero."""

    @staticmethod
    def forward(ctx, y_PD: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        ctx.num_rows = y_PD.shape[0]
        return y_PD.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)

    @staticmethod
    def backward(ctx, grad_TKD: Tensor):  # type: ignore[override]
        (row_TK,) = ctx.saved_tensors
        grad_PD = grad_TKD.new_zeros(ctx.num_rows, grad_TKD.shape[-1])
        return grad_PD.index_copy_(0, row_TK.flatten(), grad_TKD.flatten(0, 1)), None


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


class Gate(nn.Module):
    """Router weights, [E, D]."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(arch.num_experts, arch.hidden_size))


class Experts(nn.Module):
    """Stacked SwiGLU experts: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        hidden, inner = arch.hidden_size, arch.expert_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(arch.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(arch.num_experts, hidden, inner))

    def forward(self, x_PD: Tensor, expert_B: Tensor) -> Tensor:
        """Apply expert expert_B[b] (int64) to the b-th block of BLOCK_ROWS rows."""
        x_BRD = x_PD.view(expert_B.numel(), BLOCK_ROWS, -1)
        # Weights are repeated for their blocks by a product with zeros and ones: its backward adds
        # the blocks of an expert by a product too, where that of index_select is a slow scatter.
        pick_BE = F.one_hot(expert_B, self.down_proj.shape[0]).to(x_PD.dtype)
        up_BFD, down_BDF = (
            (pick_BE @ weight.to(x_PD.dtype).flatten(1)).unflatten(1, weight.shape[1:])
            for weight in (self.gate_up_proj, self.down_proj)
        )
        gate, up = torch.bmm(x_BRD, up_BFD.mT).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, down_BDF.mT).flatten(0, 1)


def block_rows(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give every assignment a row, experts in order, each expert's rows padded to whole blocks.

    The number of rows depends on the shapes alone, never on the routing: oneDNN compiles a kernel
    for every new shape, which costs more than the product. Returns the row of each assignment
    int64 [T, K], the token of each row int64 [P] (0 for padding), the expert of each block int64
    [P / BLOCK_ROWS] and the load int64 [E]. Example with blocks of 4: loads 5, 0, 2 take blocks
    0 0 2; loads need at most N/4 + E blocks, so the rest belong to the last expert and stay empty.
    """
    ids_N = ids_TK.flatten()
    load_E = torch.bincount(ids_N, minlength=num_experts)
    blocks_E = (load_E + BLOCK_ROWS - 1) // BLOCK_ROWS
    num_blocks = ids_N.numel() // BLOCK_ROWS + num_experts
    ends_E = blocks_E.cumsum(0)
    expert_B = torch.bucketize(torch.arange(num_blocks), ends_E, right=True)
    order_N = ids_N.argsort(stable=True)
    shift_E = (ends_E - blocks_E) * BLOCK_ROWS - (load_E.cumsum(0) - load_E)
    row_N = torch.empty_like(ids_N)
    row_N[order_N] = torch.arange(ids_N.numel()) + shift_E[ids_N[order_N]]
    source_P = torch.zeros(num_blocks * BLOCK_ROWS, dtype=torch.int64)
    source_P[row_N] = torch.arange(ids_N.numel()) // ids_TK.shape[1]
    return row_N.view_as(ids_TK), source_P, expert_B.clamp(max=num_experts - 1), load_E


class MoE(nn.Module):
    """Top-k routing over all experts, without capacity: no assignment is dropped in training."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        self.arch = arch
        self.gate = Gate(arch)
        self.experts = Experts(arch)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [T, D], the balance loss (scalar) and the load int64 [E]."""
        arch = self.arch
        # In float32: a bfloat16 router would choose other experts than the exported float32 model.
        with torch.autocast("cpu", enabled=False):
            probs_TE = F.linear(x_TD.float(), self.gate.weight).softmax(dim=-1)
        weights_TK, ids_TK = probs_TE.topk(arch.top_k, dim=-1)
        if arch.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        row_TK, source_P, expert_B, load_E = block_rows(ids_TK, arch.num_experts)
        y_PD = self.experts(_Dispatch.apply(x_TD, source_P, row_TK), expert_B)
        y_TKD = _Combine.apply(y_PD, row_TK)
        out_TD = torch.einsum("tkd,tk->td", y_TKD, weights_TK.to(y_TKD.dtype))
        # Switch Transformer's balance loss (Fedus et al. 2021, section 2.2): 1 when even.
        balance = arch.num_experts * (load_E / load_E.sum() * probs_TE.mean(dim=0)).sum()
        return out_TD, balance, load_E


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
