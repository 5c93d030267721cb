"""AWQ and GPTQ: int4 matrices that are stored transposed, [inputs, outputs].

|         | AWQ                                     | GPTQ                                     |
|---------|-----------------------------------------|------------------------------------------|
| qweight | I32 [inputs, outputs / 8]               | I32 [inputs / 8, outputs]                |
| order   | outputs 0, 2, 4, 6, 1, 3, 5, 7          | inputs in order                          |
| qzeros  | I32 [groups, outputs / 8], same order   | I32 [groups, outputs / 8], in order      |
| zero    | as stored                               | stored minus 1 (`gptq`), or as is (`v2`) |
| scales  | [groups, outputs]                       | the same                                 |
| g_idx   | none                                    | I32 [inputs], the group of each input    |

The first of an order is in the lowest bits of a word.

    weight = (value - zero) * scale

Of `gptq`, 1 was taken from each zero point when the eight of a word were packed already: a zero
point of 0 is stored as 15 and borrows from the next. So 1 is added to each of a whole word, with
carries. (AutoGPTQ took it before it packed, and asymmetric files of its that hold a zero point of
0 are damaged; symmetric ones have 8 everywhere.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from engine.weights.entry import Fetch, IntegerRows, Piece, Span, TensorEntry
from engine.weights.formats.blocks import covering, matrix_of, split, unpack
from engine.weights.safetensors_header import CheckpointError

BITS = 4
_PER_WORD = 32 // BITS
_ONES = 0x11111111  # 1 in each value of a word
# Of eight neighbouring outputs, the place in the word of each.
_AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True, slots=True)
class TransposedWeight:
    """A weight in int4 as AWQ or GPTQ store it; see `StoredWeight`."""

    parts: Mapping[str, TensorEntry]
    qweight: TensorEntry
    qzeros: TensorEntry
    scales: TensorEntry
    group_index: TensorEntry | None
    group_size: int
    is_awq: bool
    zero_offset: int  # 1: to be added to stored zero points, else 0

    @property
    def bits(self) -> int:
        """Return the bits of an integer."""
        return BITS

    @property
    def has_zero(self) -> bool:
        """Return whether groups have zero points of their own."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight, [outputs, inputs]."""
        rows, columns = self.qweight.shape
        return (columns * _PER_WORD, rows) if self.is_awq else (columns, rows * _PER_WORD)

    def integers(self, fetch: Fetch) -> Iterator[IntegerRows]:
        """Yield the integers; see `IntegerWeight`. The packed matrix is read at once."""
        rows, columns = self.shape
        self._check_order(fetch)
        groups = 0, self.scales.shape[0]
        scale_OG = fetch(self.scales, groups, (0, rows)).float().T
        zero_OG = self._zeros(fetch, groups, (0, rows)).T
        height, width = self.qweight.shape
        words = fetch(self.qweight, (0, height), (0, width))
        for part in split((0, rows), columns):
            if self.is_awq:
                first, last = covering(part, _PER_WORD)
                q_IO = self._outputs(words[:, first:last], part)
            else:
                q_IO = unpack(words[:, slice(*part)], BITS, (0, columns), 0)
            yield IntegerRows(part[0], q_IO.T, scale_OG[slice(*part)], zero_OG[slice(*part)])

    def _check_order(self, fetch: Fetch) -> None:
        if self.group_index is None:
            return
        index = fetch(matrix_of(self.group_index, 0, False), (0, self.shape[1]), (0, 1)).flatten()
        if not torch.equal(index.long(), torch.arange(len(index)) // self.group_size):
            name = next(key for key, part in self.parts.items() if part is self.group_index)
            raise CheckpointError(
                f"model.quantization: {name} in {self.group_index.file} puts inputs into groups by "
                "their activations, although config.json says desc_act: false; such integers are "
                "not kept: set model.quantization to dequantize, int8 or int4"
            )

    def pieces(self, index: int, rows: Span, columns: Span, fetch: Fetch) -> Iterator[Piece]:
        """Yield dequantised pieces, of some inputs and all outputs each; see `StoredWeight`."""
        assert index == 0, "experts are stored one by one"
        num_groups, chosen = self.scales.shape[0], None
        first, last = covering(columns, self.group_size)
        if self.group_index is not None:
            entry = matrix_of(self.group_index, 0, False)
            chosen = fetch(entry, columns, (0, 1)).flatten().long()
            first, last = 0, num_groups
        scales = fetch(self.scales, (first, last), rows).float()
        zeros = self._zeros(fetch, (first, last), rows)
        for part in split(columns, rows[1] - rows[0]):
            if chosen is None:
                groups = torch.arange(*part) // self.group_size - first
            else:
                groups = chosen[part[0] - columns[0] : part[1] - columns[0]]
            if self.is_awq:
                stored = fetch(self.qweight, part, covering(rows, _PER_WORD))
                values = self._outputs(stored, rows)
            else:
                stored = fetch(self.qweight, covering(part, _PER_WORD), rows)
                values = unpack(stored, BITS, part, 0)
            values = (values - zeros[groups]).float().mul_(scales[groups])
            yield Piece(rows, part, values.T)

    def _zeros(self, fetch: Fetch, groups: Span, rows: Span) -> torch.Tensor:
        """Return the zero points [groups, outputs] of some groups and outputs."""
        words = fetch(self.qzeros, groups, covering(rows, _PER_WORD))
        return self._outputs(words + _ONES if self.zero_offset else words, rows)

    def _outputs(self, words: torch.Tensor, rows: Span) -> torch.Tensor:
        """Return the integers of some outputs, which are packed along the columns of `words`."""
        if not self.is_awq:
            return unpack(words, BITS, rows, 1)
        values = unpack(words, BITS, (0, words.shape[1] * _PER_WORD), 1)
        values = values.unflatten(1, (-1, _PER_WORD))[..., _AWQ_PLACES].flatten(1)
        return values.narrow(1, rows[0] % _PER_WORD, rows[1] - rows[0])


def transposed_weight(
    module: str,
    parts: Mapping[str, TensorEntry],
    *,
    is_awq: bool,
    group_size: int | None,
    zero_offset: int,
) -> TransposedWeight:
    """Return how to read a weight of AWQ or GPTQ.

    Args:
        module: name of the linear layer.
        parts: its tensors by name.
        group_size: inputs per scale; None: one scale per output.

    Raises:
        CheckpointError: a part is missing, or the parts do not fit each other.
    """
    qweight = parts[f"{module}.qweight"]
    qzeros, scales = parts.get(f"{module}.qzeros"), parts.get(f"{module}.scales")
    group_index = parts.get(f"{module}.g_idx")
    if qzeros is None or scales is None:
        lacking = "qzeros" if qzeros is None else "scales"
        raise CheckpointError(
            f"{module}.qweight in {qweight.file} has no {module}.{lacking}; download the rest of "
            "the checkpoint"
        )
    sound = len(qweight.shape) == len(scales.shape) == 2 and qweight.dtype == "I32"
    if sound:
        rows, columns = qweight.shape
        outputs = columns * _PER_WORD if is_awq else columns
        inputs = rows if is_awq else rows * _PER_WORD
        group_size = group_size or max(1, inputs)
        groups = -(-inputs // group_size)
        sound = scales.shape == (groups, outputs) and qzeros.dtype == "I32"
        sound = sound and qzeros.shape == (groups, -(-outputs // _PER_WORD))
        if group_index is not None:
            sound = sound and group_index.dtype == "I32" and group_index.shape == (inputs,)
    if not sound or not group_size:
        shapes = ", ".join(f"{key} {each.dtype} {list(each.shape)}" for key, each in parts.items())
        raise CheckpointError(
            f"{module} in {qweight.file}: its parts do not fit each other as int4 ({shapes}; "
            f"config.json has groups of {group_size}); use the files the checkpoint was published "
            "with"
        )
    return TransposedWeight(
        parts, qweight, qzeros, scales, group_index, group_size, is_awq, zero_offset
    )
