"""Local experts: the weights of a rank's instances, homes and copies, and what runs them.

Homes, and copies that are as precise, are stacked in one set of weights that one backend runs.
Copies of fewer bits are stacked apart; a second product runs them, on the rows behind those of the
homes. Experts that are held in few bits (`low_bit_experts.py`) are quantised while they are loaded,
and a copy is made from what its home holds, so that it does not matter when.

Legend: R rows, D model dim, F expert hidden dim, e instances on this rank, h homes, c copies.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.moe.expert_form import ExpertForm
from engine.moe.experts import ExpertsBackend, ExpertWeights, GroupedMMExperts, make_backend
from engine.moe.low_bit_experts import ExpertLayouts, LowBitExperts, Matrix
from engine.moe.placement.placement import COPY_GROUP, Precision
from engine.ops.permute import gather_rows
from engine.weights.row_sink import RowSink, fill_sink

_BITS: dict[Precision, int] = {"int8": 8, "int4": 4}


class LocalExperts(nn.Module):
    """One layer's experts on this rank, as an `ExpertsBackend` over its instances.

    Args:
        num_homes: h.
        num_copies: c.
        precision: of the copies; never more than that of the homes.
        hidden, ffn: D and F.
        backend: the resolved name, never `auto`; of experts in the model's precision.
        device, dtype: of the weights.
        layouts: how homes are held in few bits; None: in `dtype`.
        form: what the experts compute.

    Weights are allocated uninitialised.

    Raises:
        ValueError: low-bit copies of experts that are not plain SwiGLU.
    """

    takes_some_rows: bool = False
    stacked: ExpertWeights  # of instances in the model's precision; there may be none

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
        layouts: ExpertLayouts | None = None,
        form: ExpertForm = ExpertForm(),  # noqa: B008
    ) -> None:
        super().__init__()
        if precision != "model" and not form.is_plain:
            raise ValueError(
                f"moe.placement: {precision} copies run plain SwiGLU experts alone, and this "
                f"model's have {form.words}; plan copies in the model's precision (tools/"
                "plan_placement.py --precision model)"
            )
        # How copies are held, on this rank or others, where that is not how homes are.
        self.copy_layouts = _copy_layouts(precision, layouts)
        self.num_homes, self.num_copies = num_homes, num_copies
        self._shape, self.form = (hidden, ffn), form
        self.num_stacked = num_homes + (num_copies if self.copy_layouts is None else 0)
        num_plain = self.num_stacked if layouts is None else 0
        self.stacked = ExpertWeights(num_plain, hidden, ffn, device, dtype, form)
        self.low_bit: LowBitExperts | None = None  # homes, and copies that are as precise
        if layouts is not None:
            self.low_bit = LowBitExperts(
                self.num_stacked, hidden, ffn, layouts, device, dtype, form=form
            )
        self.low_bit_copies: LowBitExperts | None = None
        if self.copy_layouts is not None:
            # Of integers that are kept the values are what the home holds.
            is_made = layouts is not None and not layouts.kept
            self.low_bit_copies = LowBitExperts(
                num_copies,
                hidden,
                ffn,
                self.copy_layouts,
                device,
                torch.float32 if layouts is not None and layouts.kept else dtype,
                layouts if is_made else None,
            )
        self._run: ExpertsBackend = self.low_bit or make_backend(backend, self.stacked)
        self.name = self._run.name  # the backend in use

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copies' weights."""
        return self.copy_size * self.num_copies

    @property
    def copy_size(self) -> int:
        """Bytes of one copy's weights, of this precision, wherever it is."""
        hidden, ffn = self._shape
        held = self.low_bit_copies or self.low_bit
        if held is not None:
            return held.bytes_per_expert
        parts = self.form.parts
        numbers = (parts + 1) * hidden * ffn + self.form.bias * (parts * ffn + hidden)
        return numbers * self.stacked.w13_e2FD.element_size()

    def low_bit_of(self, local: int) -> tuple[LowBitExperts, int] | None:
        """Return the stack of integers that holds an instance and its place there; None where it is
        in the model's precision.
        """
        if local < self.num_stacked:
            return None if self.low_bit is None else (self.low_bit, local)
        assert self.low_bit_copies is not None
        return self.low_bit_copies, local - self.num_stacked

    def weights_of(self, local: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of an instance in the model's precision: w13 [2F, D] and w2 [D, F], as
        views.
        """
        assert self.low_bit_of(local) is None, "held as integers"
        return self.stacked.w13_e2FD[local], self.stacked.w2_eDF[local]

    def target(
        self, local: int, matrix: Matrix, first: int, count: int, *, alternate: bool = False
    ) -> tuple[torch.Tensor, RowSink | None]:
        """Return the target and the sink, if any, of a `WeightSlot` for some rows of an instance.

        Args:
            local: the instance.
            matrix: w13 [2F, D] or w2 [D, F].
            first, count: its rows.
            alternate: whether those of gate and up alternate in the checkpoint.
        """
        held = self.low_bit_of(local)
        if held is None:
            weights = self.weights_of(local)[matrix == "w2"]
            return weights[first : first + count], None
        experts, place = held
        sink = experts.rows(matrix, place, first, count, alternate=alternate)
        return torch.empty(sink.shape, dtype=experts.dtype, device="meta"), sink

    def set_weights(self, local: int, w13_2FD: torch.Tensor, w2_DF: torch.Tensor) -> None:
        """Copy weights of any float dtype to an instance, before `finalize_weights`."""
        matrices: tuple[tuple[Matrix, torch.Tensor], ...] = (("w13", w13_2FD), ("w2", w2_DF))
        for matrix, weights in matrices:
            target, sink = self.target(local, matrix, 0, len(weights))
            if sink is None:
                target.copy_(weights)
            else:
                fill_sink(sink, target, lambda view, weights=weights: view.copy_(weights))

    def use_weights(
        self,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
        b13_e2F: torch.Tensor | None = None,
        b2_eD: torch.Tensor | None = None,
    ) -> None:
        """Take tensors in place of the allocated ones, without a copy; before `finalize_weights`,
        which changes them.

        Args:
            w13_e2FD, w2_eDF: contiguous, in the model's precision.
            b13_e2F, b2_eD: where the form has biases, in the dtype that is computed in.
        """
        assert self.low_bit is None and not self.num_copies, "homes in the model's precision only"
        given = {"w13_e2FD": w13_e2FD, "w2_eDF": w2_eDF, "b13_e2F": b13_e2F, "b2_eD": b2_eD}
        for name, weights in given.items():
            held = getattr(self.stacked, name)
            assert (held is None) == (weights is None), name
            if weights is not None:
                assert weights.is_contiguous() and weights.shape == held.shape, name
                setattr(self.stacked, name, nn.Parameter(weights.detach(), requires_grad=False))
        self._run = make_backend(self.name, self.stacked)

    def biases_of(self, local: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the biases to load of an instance, [2F] and [D], as views; None: none."""
        if (held := self.low_bit_of(local)) is not None:
            experts, local = held
            b13_e2F, b2_eD = experts.b13_eN, experts.b2_eD
        else:
            b13_e2F, b2_eD = self.stacked.b13_e2F, self.stacked.b2_eD
        return None if b13_e2F is None or b2_eD is None else (b13_e2F[local], b2_eD[local])

    def warm_up(self, dtype: torch.dtype) -> None:
        """Run every form that the products of low-bit experts may take in a step.

        dtype: of rows.
        """
        for each in (self.low_bit, self.low_bit_copies):
            if each is not None:
                each.warm_up(dtype)

    def finalize_weights(self) -> None:
        """Change the loaded weights to the backend's layout, in place."""
        self._run.finalize_weights()

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

    @property
    def takes_device_counts(self) -> bool:
        """Whether `run_bounded` reads no count of a CUDA device on the host."""
        return isinstance(self._run, GroupedMMExperts) and self.copy_layouts is None

    def run_bounded(self, rows_RD: torch.Tensor, load_e: torch.Tensor) -> torch.Tensor:
        """Run the instances on rows that are grouped from the first on; return [R, D], undefined
        past the last row. On CUDA only where `takes_device_counts`.

        Args:
            rows_RD: R places, of which the counts say how many are rows.
            load_e: int64, rows of each instance, on the rows' device.
        """
        if not rows_RD.is_cpu:
            assert isinstance(self._run, GroupedMMExperts), "needs counts on the host"
            return self._run.run_bounded(rows_RD, load_e)
        counts = load_e.tolist()
        out_RD, end = torch.empty_like(rows_RD), sum(counts)
        if end:
            made_RD = self(rows_RD[:end], counts, out_RD[:end])
            if made_RD.data_ptr() != out_RD.data_ptr():  # a backend may return its own tensor
                out_RD[:end].copy_(made_RD)
        return out_RD

    def _run_grouped(
        self,
        rows_RD: torch.Tensor,
        counts_h: list[int],
        counts_c: list[int],
        out_RD: torch.Tensor,
    ) -> torch.Tensor:
        """Run homes and copies of fewer bits on grouped rows; return out_RD."""
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
        """Run copies of fewer bits; the same arguments as those of `ExpertsBackend.__call__`."""
        assert self.low_bit_copies is not None
        return self.low_bit_copies(rows_RD, counts_c, out_RD, index_R)

    __call__ = forward  # pyright: ignore[reportAssignmentType]


def _copy_layouts(precision: Precision, homes: ExpertLayouts | None) -> ExpertLayouts | None:
    """Return how copies are held where that is not how homes are."""
    bits = _BITS.get(precision)
    if bits is None or (homes is not None and homes.bits <= bits):
        return None
    return ExpertLayouts.of_bits(bits, COPY_GROUP)
