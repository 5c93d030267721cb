"""Experts: one protocol over stacked weights, several ways to run the matrix products.

All backends read the same two tensors, w13_e2FD (gate rows, then up rows) and w2_eDF; none keeps a
second copy. Once they are loaded, `finalize_weights` lets the backend change their layout in place.

| backend    | runs on   | how                                                                    |
|------------|-----------|------------------------------------------------------------------------|
| torch      | CPU, CUDA | engine.ops.grouped_ffn: native kernel on CPU in float32, else a loop   |
| grouped_mm | CPU, CUDA | torch's grouped matrix product, expert boundaries stay on the device   |
| te         | CUDA      | Transformer Engine's GroupedLinear over views of the stacked weights   |

`backend_choice.py` says which one a setting means on a device.

Legend: R rows, D model dim, F expert hidden dim, e experts on this rank.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, Protocol

import torch
from torch import nn

from engine.moe.backend_choice import find_grouped_mm, import_transformer_engine
from engine.ops.grouped_ffn import grouped_ffn
from engine.ops.huge_pages import prefer_huge_pages
from engine.ops.panels import to_panels
from engine.ops.permute import gather_rows
from engine.ops.silu_and_mul import silu_and_mul
from engine.ops.to_device import to_device


class ExpertWeights(nn.Module):
    """The stacked weights of this rank's experts: w13_e2FD [e, 2F, D] and w2_eDF [e, D, F]."""

    def __init__(
        self, num_local: int, hidden: int, ffn: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.w13_e2FD = _empty(num_local, 2 * ffn, hidden, device=device, dtype=dtype)
        self.w2_eDF = _empty(num_local, hidden, ffn, device=device, dtype=dtype)

    def to_panels(self) -> None:
        """Change them to the packed layout of the compiled CPU kernels, where those run: in place,
        and for `grouped_ffn` alone from then on.
        """
        to_panels(self.w13_e2FD, stacked=2)
        to_panels(self.w2_eDF)


class ExpertsBackend(Protocol):
    """Runs the local experts' feed-forward: y = (silu(x w1^T) * (x w3^T)) w2^T for each expert's
    rows.
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


class _GroupedExperts(ExpertsBackend):
    """A backend that needs the rows grouped by expert. The weights stay as loaded."""

    takes_some_rows = False

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


class GroupedMMExperts(_GroupedExperts):
    """torch's grouped_mm: one call per projection for any number of experts."""

    name = "grouped_mm"

    def __init__(self, weights: ExpertWeights) -> None:
        self._weights = weights
        grouped_mm = find_grouped_mm()
        assert grouped_mm is not None, "choose_backend refuses it"
        self._grouped_mm = grouped_mm

    def _run(self, rows_RD: torch.Tensor, expert_counts: list[int]) -> torch.Tensor:
        counts = torch.tensor(expert_counts, dtype=torch.int32)
        ends = to_device(counts.cumsum(0, dtype=torch.int32), rows_RD.device)
        # Widened where the rows are wider, on the CPU: grouped_mm takes one dtype.
        w13 = self._weights.w13_e2FD.to(rows_RD.dtype).transpose(1, 2)
        hidden = silu_and_mul(self._grouped_mm(rows_RD, w13, offs=ends))
        w2 = self._weights.w2_eDF.to(rows_RD.dtype).transpose(1, 2)
        return self._grouped_mm(hidden, w2, offs=ends)


class TransformerEngineExperts(_GroupedExperts):
    """Transformer Engine's GroupedLinear, its weights replaced by views of the stacked ones."""

    name = "te"

    def __init__(self, weights: ExpertWeights) -> None:
        te = import_transformer_engine()
        self._up = _grouped_linear(te, weights.w13_e2FD)
        self._down = _grouped_linear(te, weights.w2_eDF)
        # From 2.17 the splits are a tensor; a list is what earlier releases take.
        annotation = inspect.signature(te.GroupedLinear.forward).parameters["m_splits"].annotation
        self._splits_as_tensor = "Tensor" in str(annotation)

    def _run(self, rows_RD: torch.Tensor, expert_counts: list[int]) -> torch.Tensor:
        splits: Any = torch.tensor(expert_counts) if self._splits_as_tensor else expert_counts
        return self._down(silu_and_mul(self._up(rows_RD, splits)), splits)


def make_backend(name: str, weights: ExpertWeights) -> ExpertsBackend:
    """Build a resolved backend (never `auto`) over the weights."""
    backends = {
        "torch": TorchExperts,
        "grouped_mm": GroupedMMExperts,
        "te": TransformerEngineExperts,
    }
    return backends[name](weights)


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
    # Decode reads every weight once per step, so memory bandwidth sets its time.
    prefer_huge_pages(weights)
    return nn.Parameter(weights, requires_grad=False)
