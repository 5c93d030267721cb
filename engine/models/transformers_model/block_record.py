"""Block record: an MoE block of transformers, what it is called with and where its logits are.

The block has run on the meta device. Its router is then given memory and random weights and run
alone: whatever of its outputs explains its combine weights (`router_scores.py`) are the logits.
Matrices that are not the router's, as of a shared expert, stay without memory.

Legend: T tokens of a call, N of all calls, D model dim, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from engine.models.transformers_model.block_stand_ins import (
    EndsRun,
    Reached,
    Returns,
    random_numbers,
)
from engine.models.transformers_model.router_scores import RouterScores, fit_rule

# Of the calls: by how much all logits are moved, and by what their spread is multiplied. Small sums
# of scores show what is added to them, and their minimum.
_CALLS = (
    *((0.0, 1.0), (0.0, 1.0), (0.0, 3.0), (3.0, 1.0), (-6.0, 1.0), (0.0, 0.3)),
    *((-14.0, 1.0), (-24.0, 1.0), (-40.0, 1.0), (-50.0, 1.0), (-60.0, 1.0)),
    *((0.0, spread) for spread in (8.0, 12.0, 16.0, 20.0, 24.0, 30.0) for _ in range(3)),
)
# Fills of the weights, by the size of vectors: a rule that depends on a weight is none, and a large
# correction bias chooses experts of small scores.
_FILLS = (0.3, 3.0)


class BlockRecord:
    """What a block and its modules are called with and return, on the meta device.

    Args:
        block: the module that calls router and experts.
        experts: name of the experts module in the block.
        num_experts: E.
    """

    def __init__(self, block: nn.Module, experts: str, num_experts: int) -> None:
        self._block, self._experts = block, experts
        self._num_experts = num_experts
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._outputs: dict[str, Any] = {}  # name of a module in the block -> its output
        self._handles = [block.register_forward_pre_hook(self._enters, with_kwargs=True)]
        for name, module in block.named_modules():
            if name and name != experts:
                self._handles.append(module.register_forward_hook(self._returned(name)))

    def _enters(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = args, dict(kwargs)

    def _returned(self, name: str) -> Callable[..., None]:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            self._outputs[name] = output

        return record

    @property
    def signature(self) -> tuple[Any, ...]:
        """What tells this block's router from another's: kinds, shapes and numbers of modules."""
        return self._experts, *(
            (
                name,
                type(module),
                tuple((key, tuple(each.shape)) for key, each in _own_tensors(module)),
                tuple(sorted((k, str(v)) for k, v in vars(module).items() if _tells(k, v))),
            )
            for name, module in self._block.named_modules()
        )

    def scores(self, num_tokens: int, top_k: int) -> RouterScores | None:
        """Return where the scores are; None: they are not known. The block cannot run afterwards.

        Args:
            num_tokens: T of the recorded call.
            top_k: K.
        """
        for handle in self._handles:
            handle.remove()
        wanted = num_tokens * self._num_experts
        places = [
            (name, index)
            for name, output in self._outputs.items()
            for index, each in _tensors(output)
            if each.is_floating_point()
            and each.shape[-1:] == (self._num_experts,)
            and each.numel() == wanted
        ]
        order = {name: number for number, (name, _) in enumerate(self._block.named_modules())}
        places.sort(key=lambda place: (order[place[0]], place[1] or 0))  # the outermost first
        if not places or self._arguments is None:
            return None
        try:
            with torch.no_grad():
                tries = [self._run(places, *fill) for fill in enumerate(_FILLS)]
        except Exception:  # a block that does not run alone has no scores that could be fitted
            return None
        small = self._small_numbers()
        for number, (name, index) in enumerate(places):
            logits_NE = torch.cat([logits[number] for logits, _, _ in tries])
            ids_NK = torch.cat([ids for _, ids, _ in tries])
            weights_NK = torch.cat([weights for _, _, weights in tries])
            if (rule := fit_rule(logits_NE, ids_NK, weights_NK, top_k, small)) is not None:
                return RouterScores(
                    name=name,
                    index=index,
                    score=rule.score,
                    normalize=rule.normalize,
                    normalize_eps=rule.normalize_eps,
                    normalize_min=rule.normalize_min,
                    scale=rule.scale,
                )
        return None

    def _run(
        self, places: Sequence[tuple[str, int | None]], seed: int, size: float
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return the outputs [N, E] at some places, ids and weights [N, K] of random calls."""
        assert self._arguments is not None
        random = torch.Generator().manual_seed(seed)
        wanted = {name for name, _ in places}
        if seed == 0:
            self._to_memory(wanted)
        common = self._fill(random, size)
        caught: dict[str, Any] = {}
        handles = [
            self._block.get_submodule(name).register_forward_hook(_keeps(caught, name))
            for name in wanted
        ]
        args, kwargs = self._arguments
        found: list[list[torch.Tensor]] = [[] for _ in range(len(places) + 2)]
        for call in _CALLS:
            given = [random_numbers(each, random, common, call) for each in args]
            named = {
                key: random_numbers(each, random, common, call) for key, each in kwargs.items()
            }
            try:
                self._block(*given, **named)
            except Reached as reached:
                ids, weights = reached.ids, reached.weights
            else:
                raise ValueError("the block does not call its experts")
            for each, (name, index) in zip(found, places, strict=False):
                output = caught[name] if index is None else caught[name][index]
                each.append(output.reshape(-1, self._num_experts).float())
            found[-2].append(ids)
            found[-1].append(weights.float())
        for handle in handles:
            handle.remove()
        *logits, ids_NK, weights_NK = (torch.cat(each) for each in found)
        return logits, ids_NK, weights_NK

    def _to_memory(self, wanted: set[str]) -> None:
        """Give the router's modules memory; others of matrices return zeros in their place."""
        block = self._block
        setattr(block, self._experts, EndsRun())
        block.to_empty(device="cpu", recurse=False)
        pending = [name for name, _ in block.named_children() if name != self._experts]
        while pending:
            name = pending.pop()
            module = block.get_submodule(name)
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            if name not in self._outputs:
                module.to_empty(device="cpu", recurse=False)
                pending += children
            elif any(each == name or each.startswith(f"{name}.") for each in wanted) or all(
                each.dim() < 2 for each in module.parameters()
            ):
                module.to_empty(device="cpu")
            else:
                parent, _, last = name.rpartition(".")
                block.get_submodule(parent)._modules[last] = Returns(self._outputs[name])

    def _small_numbers(self) -> list[float]:
        """Return the numbers between 0 and 1 that modules of the block hold."""
        numbers = {
            value
            for module in self._block.modules()
            for value in vars(module).values()
            if isinstance(value, float) and 0.0 < value < 1.0
        }
        return sorted(numbers)

    def _fill(self, random: torch.Generator, size: float) -> dict[int, torch.Tensor]:
        """Draw all weights; return by width the direction in which logits move alike."""
        common: dict[int, torch.Tensor] = {}
        for tensor in [*self._block.parameters(), *self._block.buffers()]:
            if tensor.is_meta:
                continue
            if not tensor.is_floating_point():
                tensor.zero_()
                continue
            tensor.copy_(torch.randn(tensor.shape, generator=random))
            width = tensor.shape[-1] if tensor.dim() > 1 else 0
            if tensor.dim() == 2 and tensor.shape[0] == self._num_experts:
                if width not in common:
                    direction = torch.randn(width, generator=random)
                    common[width] = direction / direction.norm()
                direction = common[width]
                tensor -= (tensor @ direction)[:, None] * direction
                tensor.mul_(1.5 * width**-0.5).add_(direction)
            else:
                tensor.mul_(size)
        return common


class BlockRecords:
    """The blocks of a model; those that are alike are run once.

    Args:
        model: of transformers, on the meta device.
        num_tokens: T of its run.
    """

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        self._model, self._num_tokens = model, num_tokens
        self._blocks: dict[str, BlockRecord] = {}  # by path of the experts
        self._found: dict[Any, RouterScores | None] = {}  # by signature

    def add(self, path: str, num_experts: int) -> None:
        """Record what the block around some experts does; path: of these in the model."""
        parent, _, name = path.rpartition(".")
        block = self._model.get_submodule(parent)
        self._blocks[path] = BlockRecord(block, name, num_experts)

    def scores(self, path: str, top_k: int) -> RouterScores | None:
        """Return where the scores for some experts are, after the run; None: they are not known."""
        block = self._blocks[path]
        key = (block.signature, top_k)
        if key not in self._found:
            self._found[key] = block.scores(self._num_tokens, top_k)
        return self._found[key]


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]


def _tells(key: str, value: Any) -> bool:
    """Return whether an attribute of a module may change what it computes."""
    is_own = not key.startswith("_") and key not in ("layer_idx", "training", "lockstep_attention")
    return is_own and isinstance(value, (bool, int, float, str, tuple, list, type(None)))


def _tensors(output: Any) -> list[tuple[int | None, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        return [(None, output)]
    if isinstance(output, (tuple, list)):
        return [(i, each) for i, each in enumerate(output) if isinstance(each, torch.Tensor)]
    return []


def _keeps(caught: dict[str, Any], name: str) -> Callable[..., None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        caught[name] = output

    return keep
