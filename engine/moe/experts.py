"""Experts: one protocol over stacked weights, several ways to run the matrix products.

All backends read the same two tensors, w13_e2FD (gate rows, then up rows) and w2_eDF; none keeps a
second copy. Once they are loaded, `finalize_weights` lets the backend change their layout in place.

| backend    | runs on   | how                                                                    |
|------------|-----------|------------------------------------------------------------------------|
| torch      | CPU, CUDA | engine.ops.grouped_ffn: native kernel on CPU in float32, else a loop   |
| grouped_mm | CPU, CUDA | torch's grouped matrix product, expert boundaries stay on the device   |
| te         | CUDA      | Transformer Engine's GroupedLinear over views of the stacked weights   |

`backend_choice.py` says what a setting means on a device, `low_bit_experts.py` has those of FP8.

The table is of plain SwiGLU. Other forms (`expert_form.py`) run on the same backends: `torch`
expert by expert, the others with an activation and biases between and after their products.

Legend: R rows, D model dim, F expert hidden dim, e experts on this rank, N 2F, without a gate F.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, Protocol

import torch
from torch import nn

from engine.layers.precision import compute_dtype
from engine.moe.backend_choice import find_grouped_mm, import_transformer_engine
from engine.moe.expert_form import ExpertForm
from engine.ops.expert_activation import activate, add_expert_bias
from engine.ops.expert_ffn import expert_ffn
from engine.ops.grouped_ffn import grouped_ffn
from engine.ops.huge_pages import prefer_huge_pages
from engine.ops.panels import matrices, to_panels
from engine.ops.permute import gather_rows
from engine.ops.to_device import to_device


class ExpertWeights(nn.Module):
    """The stacked weights of this rank's experts: w13_e2FD [e, 2F, D], without a gate [e, F, D],
    and w2_eDF [e, D, F]; where the form has biases, b13_e2F [e, 2F] and b2_eD [e, D].
    """

    def __init__(
        self,
        num_local: int,
        hidden: int,
        ffn: int,
        device: torch.device,
        dtype: torch.dtype,
        form: ExpertForm = ExpertForm(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.form = form
        inner = form.parts * ffn
        self.w13_e2FD = _empty(num_local, inner, hidden, device=device, dtype=dtype)
        self.w2_eDF = _empty(num_local, hidden, ffn, device=device, dtype=dtype)
        self.b13_e2F = self.b2_eD = None
        if form.bias:
            wide = compute_dtype(dtype, device)
            self.b13_e2F = _empty(num_local, inner, device=device, dtype=wide)
            self.b2_eD = _empty(num_local, hidden, device=device, dtype=wide)

    @property
    def tensors(self) -> list[nn.Parameter]:
        """All of them, each [e, ...]."""
        each = (self.w13_e2FD, self.w2_eDF, self.b13_e2F, self.b2_eD)
        return [weight for weight in each if weight is not None]

    def to_panels(self) -> None:
        """Change them to the packed layout of the compiled CPU kernels, where those run: in place,
        and for `grouped_ffn` alone from then on, for other forms for `expert_ffn`.
        """
        to_panels(self.w13_e2FD, stacked=2 if self.form.is_plain else 1)
        to_panels(self.w2_eDF)


class ExpertsBackend(Protocol):
    """Runs the local experts' feed-forward: y = (silu(x w1^T) * (x w3^T)) w2^T for each expert's
    rows, or what the model's `ExpertForm` puts in its place.
    """

    name: str
    takes_some_rows: bool  # index_R may name some of the rows; results of the others are left as
    # they are in out_RD

    def finalize_weights(self) -> None:
        """Change the loaded weights to the backend's own layout, in place, where it has one."""

    def __call__(
        self,
        rows_RD: torch.Tensor,
        expert_counts: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the experts' outputs [R, D], each at the index of its row.

        Args:
            rows_RD: rows grouped by local expert, or in the order that index_R maps to.
            expert_counts: rows of each local expert.
            out_RD: a buffer that the backend may return the outputs in.
            index_R: int64, the row of each grouped position; None: rows_RD is grouped. A backend
                need not move the rows.
        """
        ...


class TorchExperts:
    """engine.ops.grouped_ffn: native on CPU in float32, else one expert after the other."""

    name = "torch"
    takes_some_rows = True

    def __init__(self, weights: ExpertWeights) -> None:
        self._weights = weights

    def finalize_weights(self) -> None:
        """Change to the packed layout, where the native kernel runs."""
        self._weights.to_panels()

    def __call__(
        self,
        rows_RD: torch.Tensor,
        expert_counts: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the experts; see `ExpertsBackend`."""
        w13_e2FD, w2_eDF = self._weights.w13_e2FD, self._weights.w2_eDF
        return grouped_ffn(rows_RD, w13_e2FD, w2_eDF, expert_counts, out_RD, index_R)


class FormedExperts:
    """engine.ops.expert_ffn: experts of any form, one after the other."""

    name = "torch"
    takes_some_rows = True

    def __init__(self, weights: ExpertWeights) -> None:
        self._weights = weights
        self._list()

    def finalize_weights(self) -> None:
        """Change to the packed layout, where the native kernels run."""
        self._weights.to_panels()
        self._list()

    def _list(self) -> None:
        """List the matrices and biases per expert, as views."""
        weights = self._weights
        self._w13, self._w2 = matrices(weights.w13_e2FD), matrices(weights.w2_eDF)
        self._b13 = None if weights.b13_e2F is None else weights.b13_e2F.detach().unbind()
        self._b2 = None if weights.b2_eD is None else weights.b2_eD.detach().unbind()

    def __call__(
        self,
        rows_RD: torch.Tensor,
        expert_counts: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the experts; see `ExpertsBackend`."""
        weights, biases = (self._w13, self._w2), (self._b13, self._b2)
        rule = self._weights.form.rule
        return expert_ffn(rows_RD, weights, biases, rule, expert_counts, out_RD, index_R)


class _GroupedExperts(ExpertsBackend):
    """A backend that needs the rows grouped by expert. The weights stay as loaded."""

    takes_some_rows = False
    _weights: ExpertWeights

    def __call__(
        self,
        rows_RD: torch.Tensor,
        expert_counts: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the experts; see `ExpertsBackend`."""
        if not rows_RD.shape[0]:
            return torch.empty_like(rows_RD)
        if index_R is None:
            return self._run(rows_RD, expert_counts)
        grouped_RD = torch.empty_like(rows_RD) if out_RD is None else out_RD
        grouped_RD = gather_rows(rows_RD, index_R, grouped_RD)
        return grouped_RD.index_copy_(0, index_R, self._run(grouped_RD, expert_counts))

    @abstractmethod
    def _run(self, rows_RD: torch.Tensor, expert_counts: list[int]) -> torch.Tensor:
        """Return the outputs [R, D] of grouped rows, R > 0."""

    def _between(self, hidden_RN: torch.Tensor, ends_e: torch.Tensor | None) -> torch.Tensor:
        """Return what the second product takes, of the results of the first.

        ends_e: int32, the end of each expert's rows, on their device; where there are biases.
        """
        if self._weights.b13_e2F is not None:
            add_expert_bias(hidden_RN, self._weights.b13_e2F, ends_e)
        return activate(hidden_RN, self._weights.form.rule)

    def _after(self, out_RD: torch.Tensor, ends_e: torch.Tensor | None) -> torch.Tensor:
        """Return the experts' outputs, of the results of the second product."""
        if self._weights.b2_eD is not None:
            add_expert_bias(out_RD, self._weights.b2_eD, ends_e)
        return out_RD


class GroupedMMExperts(_GroupedExperts):
    """torch's grouped_mm: one call per projection for any number of experts."""

    name = "grouped_mm"

    def __init__(self, weights: ExpertWeights) -> None:
        self._weights = weights
        grouped_mm = find_grouped_mm()
        assert grouped_mm is not None, "choose_backend refuses it"
        self._grouped_mm = grouped_mm

    def run_bounded(self, rows_RD: torch.Tensor, load_e: torch.Tensor) -> torch.Tensor:
        """Return outputs [R, D] of rows grouped from the first on, undefined past the last row.

        load_e: int64, rows of each expert, on the rows' device, where they stay; at most R in all.
        """
        return self._run_to(rows_RD, load_e.cumsum(0, dtype=torch.int32))

    def _run(self, rows_RD: torch.Tensor, expert_counts: list[int]) -> torch.Tensor:
        return self._run_to(rows_RD, _ends(expert_counts, rows_RD.device))

    def _run_to(self, rows_RD: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Return the outputs of grouped rows. ends: int32, the end of each expert's rows."""
        # Widened where the rows are wider, on the CPU: grouped_mm takes one dtype.
        w13, w2 = (
            weight.to(rows_RD.dtype).transpose(1, 2)
            for weight in (self._weights.w13_e2FD, self._weights.w2_eDF)
        )
        hidden = self._between(self._grouped_mm(rows_RD, w13, offs=ends), ends)
        return self._after(self._grouped_mm(hidden, w2, offs=ends), ends)


class TransformerEngineExperts(_GroupedExperts):
    """Transformer Engine's GroupedLinear, its weights replaced by views of the stacked ones."""

    name = "te"

    def __init__(self, weights: ExpertWeights) -> None:
        te = import_transformer_engine()
        self._weights = weights
        self._up = _grouped_linear(te, weights.w13_e2FD)
        self._down = _grouped_linear(te, weights.w2_eDF)
        # From 2.17 the splits are a tensor; a list is what earlier releases take.
        annotation = inspect.signature(te.GroupedLinear.forward).parameters["m_splits"].annotation
        self._splits_as_tensor = "Tensor" in str(annotation)

    def _run(self, rows_RD: torch.Tensor, expert_counts: list[int]) -> torch.Tensor:
        splits: Any = torch.tensor(expert_counts) if self._splits_as_tensor else expert_counts
        ends = _ends(expert_counts, rows_RD.device) if self._weights.form.bias else None
        hidden = self._between(self._up(rows_RD, splits), ends)
        return self._after(self._down(hidden, splits), ends)


def make_backend(name: str, weights: ExpertWeights) -> ExpertsBackend:
    """Build a resolved backend (never `auto`) over the weights. Raises ValueError: one of FP8."""
    if name in ("scaled_mm", "deep_gemm"):
        dtype = str(weights.w13_e2FD.dtype).removeprefix("torch.")
        text = f"{name!r} computes on experts in FP8 and these are in {dtype}"
        raise ValueError(f"moe.experts.backend: {text}; set model.quantization to fp8")
    backends = {
        "torch": TorchExperts if weights.form.is_plain else FormedExperts,
        "grouped_mm": GroupedMMExperts,
        "te": TransformerEngineExperts,
    }
    return backends[name](weights)


def _ends(expert_counts: list[int], device: torch.device) -> torch.Tensor:
    """Return the end of each expert's rows, int32, without waiting for the device."""
    ends = torch.tensor(expert_counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return to_device(ends, device)


def _grouped_linear(te: Any, weights_eOI: torch.Tensor) -> Any:
    num_experts, num_out, num_in = weights_eOI.shape
    module = te.GroupedLinear(
        num_experts, num_in, num_out, bias=False, params_dtype=weights_eOI.dtype, device="meta"
    )
    for index in range(num_experts):
        view = nn.Parameter(weights_eOI[index], requires_grad=False)
        setattr(module, f"weight{index}", view)
    return module


def _empty(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    weights = torch.empty(*shape, device=device, dtype=dtype)
    prefer_huge_pages(weights)  # decode reads all once per step, so memory bandwidth sets its time
    return nn.Parameter(weights, requires_grad=False)
