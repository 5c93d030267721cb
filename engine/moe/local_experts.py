"""Local experts: the weights of a rank's instances, homes and copies, and what runs them.

Homes, and copies in the model's precision, are stacked in one set of weights that one backend runs.
Low-bit copies are loaded in the model's precision and quantised once loaded; a second product runs
them, on the rows behind those of the homes.

Legend: R rows, D model dim, F expert hidden dim, e instances on this rank, h homes, c copies.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.moe.expert_form import ExpertForm
from engine.moe.experts import ExpertsBackend, ExpertWeights, make_backend
from engine.moe.placement.placement import COPY_GROUP, Precision
from engine.ops.permute import gather_rows
from engine.ops.quantised import (
    QuantisedWeights,
    grouped_ffn_quantised,
    num_bytes,
    quantise,
)

_BITS: dict[Precision, int] = {"int8": 8, "int4": 4}


class LocalExperts(nn.Module):
    """One layer's experts on this rank, as an `ExpertsBackend` over its instances.

    Args:
        num_homes: h.
        num_copies: c.
        precision: of the copies.
        hidden, ffn: D and F.
        backend: the resolved name, never `auto`.
        device, dtype: of the weights.
        form: what the experts compute.

    Weights are allocated uninitialised.

    Raises:
        ValueError: low-bit copies of experts that are not plain SwiGLU.
    """

    takes_some_rows: bool = False
    stacked: ExpertWeights  # of the homes, and of copies in the model's precision
    loading: ExpertWeights | None  # of low-bit copies, until they are quantised

    def __init__(
        self,
        num_homes: int,
        num_copies: int,
        precision: Precision,
        *,
        hidden: int,
        ffn: int,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        form: ExpertForm = ExpertForm(),  # noqa: B008
    ) -> None:
        super().__init__()
        if precision != "model" and not form.is_plain:
            raise ValueError(
                f"moe.placement: {precision} copies run plain SwiGLU experts alone, and this "
                f"model's have {form.words}; plan copies in the model's precision (tools/"
                "plan_placement.py --precision model)"
            )
        self.bits = _BITS.get(precision)  # of low-bit copies, on this rank or others
        self.group = COPY_GROUP
        self.num_homes, self.num_copies = num_homes, num_copies
        self._shape = hidden, ffn
        self.form = form
        self.num_stacked = num_homes + (num_copies if self.bits is None else 0)
        self.stacked = ExpertWeights(self.num_stacked, hidden, ffn, device, dtype, form)
        self.loading = None
        if self.bits is not None and num_copies:
            self.loading = ExpertWeights(num_copies, hidden, ffn, device, dtype)
        self.low_bit: tuple[QuantisedWeights, QuantisedWeights] | None = None
        self._run: ExpertsBackend = make_backend(backend, self.stacked)
        self.name = self._run.name  # the backend in use

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copies' weights."""
        if self.low_bit is not None:
            return sum(each.num_bytes for each in self.low_bit)
        return self.copy_size * (self.num_stacked - self.num_homes)

    @property
    def copy_size(self) -> int:
        """Bytes of one copy's weights, of this precision, wherever it is."""
        hidden, ffn = self._shape
        if self.bits is None:
            parts = self.form.parts
            numbers = (parts + 1) * hidden * ffn + self.form.bias * (parts * ffn + hidden)
            return numbers * self.stacked.w13_e2FD.element_size()
        return num_bytes(1, 2 * ffn, hidden, self.bits, self.group) + num_bytes(
            1, hidden, ffn, self.bits, self.group
        )

    def weights_of(self, local: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights to load of an instance: w13 [2F, D] and w2 [D, F], as views."""
        weights, index = self.stacked, local
        if local >= self.num_stacked:
            assert self.loading is not None, "low-bit copies are quantised"
            weights, index = self.loading, local - self.num_stacked
        return weights.w13_e2FD[index], weights.w2_eDF[index]

    def biases_of(self, local: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the biases to load of an instance, [2F] and [D], as views; None: none."""
        b13_e2F, b2_eD = self.stacked.b13_e2F, self.stacked.b2_eD
        return None if b13_e2F is None or b2_eD is None else (b13_e2F[local], b2_eD[local])

    def finalize_weights(self) -> None:
        """Change the loaded weights to the backend's layout in place, and quantise copies."""
        self._run.finalize_weights()
        if self.loading is not None and self.bits is not None:
            self.low_bit = (
                quantise(self.loading.w13_e2FD, self.bits, COPY_GROUP),
                quantise(self.loading.w2_eDF, self.bits, COPY_GROUP),
            )
            self.loading = None

    def forward(
        self,
        rows_RD: torch.Tensor,
        expert_counts: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the instances; see `ExpertsBackend.__call__`."""
        counts_h, counts_c = expert_counts[: self.num_stacked], expert_counts[self.num_stacked :]
        if not any(counts_c):
            return self._run(rows_RD, counts_h, out_RD, index_R)
        split = sum(counts_h)
        out_RD = torch.empty_like(rows_RD) if out_RD is None else out_RD
        if index_R is None:
            return self._run_grouped(rows_RD, counts_h, counts_c, out_RD)
        if self._run.takes_some_rows:
            self._run(rows_RD, counts_h, out_RD, index_R[:split])
            return self._run_copies(rows_RD, counts_c, out_RD, index_R[split:])
        grouped_RD = gather_rows(rows_RD, index_R, torch.empty_like(rows_RD))
        out_RD.index_copy_(0, index_R[:split], self._run(grouped_RD[:split], counts_h))
        copied_RD = self._run_copies(grouped_RD[split:], counts_c)
        return out_RD.index_copy_(0, index_R[split:], copied_RD)

    def _run_grouped(
        self,
        rows_RD: torch.Tensor,
        counts_h: list[int],
        counts_c: list[int],
        out_RD: torch.Tensor,
    ) -> torch.Tensor:
        """Run homes and low-bit copies on grouped rows; return out_RD."""
        split = sum(counts_h)
        target_RD = out_RD[:split]
        made_RD = self._run(rows_RD[:split], counts_h, target_RD)
        if made_RD.data_ptr() != target_RD.data_ptr():  # a backend may return a tensor of its own
            target_RD.copy_(made_RD)
        self._run_copies(rows_RD[split:], counts_c, out_RD[split:])
        return out_RD

    def _run_copies(
        self,
        rows_RD: torch.Tensor,
        counts_c: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run low-bit copies; the same arguments as those of `ExpertsBackend.__call__`."""
        assert self.low_bit is not None, "finalize_weights quantises the copies"
        return grouped_ffn_quantised(rows_RD, *self.low_bit, counts_c, out_RD, index_R)

    __call__ = forward  # pyright: ignore[reportAssignmentType]
