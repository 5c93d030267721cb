"""Transformer Engine's expert parallelism: rows by NCCL EP, which delivers them by expert.

A row per token and expert, grouped by expert, in a buffer of the most rows that can arrive: with a
capacity policy as many as the ranks' experts have places. The rank multiplies each result by its
weight, and the library adds up a token's results on the way home: each is rounded to bfloat16
first, as under moe.dispatch.partial_sums on ranks with one expert.

The library has one set of sizes per process, so all MoE layers of a model must have one shape.

API of `transformer_engine.pytorch.ep` of version 2.20.2 (October 2026); it needs NCCL 2.30.4: docs/
decisions.md. Never executed on a GPU.

Legend: T tokens, K top-k, D model dim, R places of rows by expert, e experts of this rank.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch.cuda import nccl

from engine.config import MoEConfig
from engine.moe.dispatch.transports.expert_blocks import equal_ids
from engine.moe.dispatch.transports.transport import (
    Arrived,
    Arriving,
    Limits,
    Outgoing,
    Ready,
    Returned,
    Setup,
)
from engine.ops.permute import combine_rows

logger = logging.getLogger(__name__)

_MOST_TOP_K = 32
_ROW_ALIGNMENT = 16  # bytes
_CAPABILITY = (9, 0)
_NCCL = (2, 30, 4)
_NEEDS = "Transformer Engine 2.20 or newer, built with NCCL EP"


def obstacle(setup: Setup, config: MoEConfig) -> str | None:
    """Return why the library cannot move a layer's rows, in words; None: it can."""
    if setup.dtype != torch.bfloat16:
        name = str(setup.dtype).removeprefix("torch.")
        return f"NCCL EP moves rows in bfloat16 alone, and these are {name} (model.dtype)"
    if config.dispatch.dtype == "fp8":
        return "moe.dispatch.dtype = 'fp8' is not built for it"
    if setup.width * setup.dtype.itemsize % _ROW_ALIGNMENT:
        return f"a row has to be a multiple of 16 bytes, and the model's are {setup.width} numbers"
    if setup.top_k > _MOST_TOP_K:
        return f"it takes at most {_MOST_TOP_K} experts per token, and the model has {setup.top_k}"
    capability = torch.cuda.get_device_capability(setup.device)
    if capability < _CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs a GPU of compute capability 9.0 or more, and this one's is {found}"
    if (version := nccl.version()) < _NCCL:
        found = ".".join(map(str, version))
        return f"it needs NCCL 2.30.4 or newer, and this torch has {found}"
    try:
        load()
    except ImportError as error:
        return str(error)
    return None


def load() -> Any:
    """Return the library's module.

    Raises:
        ImportError: it is not there, or not what is needed; the text says so in one line.
    """
    try:
        library = importlib.import_module("transformer_engine.pytorch.ep")
    except ModuleNotFoundError as error:
        name = str(error.name)
        if name == "transformer_engine":
            raise ImportError(f"it needs {_NEEDS}, which is not installed") from error
        if name.startswith("transformer_engine"):
            raise ImportError(f"it needs {_NEEDS}, and the installed one has no {name}") from error
        raise ImportError(f"it needs {_NEEDS}, whose import fails: {error}") from error
    except Exception as error:  # a build for another torch or CUDA fails in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImportError(f"it needs {_NEEDS}, whose import fails: {reason}") from error
    if not hasattr(library, "is_ep_bootstrapped"):
        raise ImportError(f"it needs {_NEEDS}, and the installed one is older")
    return library


def make(setup: Setup) -> TransformerEngineEP:
    """Return the transport of layers with one setup."""
    return TransformerEngineEP(setup, load())


class TransformerEngineEP:
    """Rows by Transformer Engine's expert parallelism; see `DeviceTransport`.

    Args:
        setup: of the layers.
        library: what `load` returns.
    """

    name = "te_ep"
    sums = True

    def __init__(self, setup: Setup, library: Any) -> None:
        self._setup, self._library = setup, library
        self._ids_E1 = equal_ids(setup.first_experts, setup.device)
        self._limits: Limits | None = None
        self._buffer: Any = None

    def reserve(self, limits: Limits) -> int:
        """Start the library for calls within the limits, and return the bytes of what is received;
        those of the library's own buffers are not known before.
        """
        setup, held = self._setup, self._limits
        limits = limits.join(held)
        if limits != held:
            self.release()
            self._start(limits)
            self._limits = limits
            places, device = self._num_places(limits), setup.device
            self._place_R = torch.arange(max(places, limits.tokens), device=device)
            self._one_T1 = torch.ones(limits.tokens, 1, device=device)
            self._recv_RD = torch.empty(places, setup.width, dtype=setup.dtype, device=device)
            self._weight_R = torch.empty(places, device=device)
            # What a rank without tokens sends: the library takes no empty tensors.
            self._no_row_1D = torch.zeros(1, setup.width, dtype=setup.dtype, device=device)
            self._no_ids_1K = torch.full((1, setup.top_k), -1, device=device)
            self._no_weights_1K = torch.zeros(1, setup.top_k, device=device)
            self._log(limits)
        return self._recv_RD.nbytes + self._weight_R.nbytes

    def release(self) -> None:
        """End the library's use of the group; see `BorrowsGroup`."""
        if self._limits is not None:
            self._library.ep_finalize()
        self._buffer = self._limits = None

    def dispatch(self, outgoing: Outgoing) -> Arriving:
        """See `DeviceTransport`."""
        assert self._limits is not None, "`reserve` comes first"
        x_TD, ids_TK, weights_TK = outgoing.x_TD, outgoing.ids_TK, outgoing.weights_TK
        self._num_tokens = x_TD.shape[0]
        if self._ids_E1 is not None:
            ids_TK = self._ids_E1[ids_TK]
        if not self._num_tokens:
            x_TD, ids_TK, weights_TK = self._no_row_1D, self._no_ids_1K, self._no_weights_1K
        rows_RD, weight_R, count_e = self._library.ep_dispatch(
            self._buffer,
            x_TD,
            ids_TK.contiguous(),
            weights_TK.contiguous(),
            recv_tokens=self._recv_RD,
            recv_topk_weights=self._weight_R,
        )
        if outgoing.most_received is not None:
            rows_RD = rows_RD[: max(outgoing.most_received, 1)]
        load_e = count_e[: self._setup.num_local]
        handle = (count_e, weight_R)
        return Ready(Arrived(rows_RD=rows_RD, load_e=load_e, places_e=load_e, handle=handle))

    def combine(self, arrived: Arrived, out_RD: torch.Tensor) -> Returned:
        """See `DeviceTransport`."""
        assert isinstance(arrived.handle, tuple)
        count_e, weight_R = arrived.handle
        place_R = self._place_R[: weight_R.shape[0]]
        # The library takes all places, and those past the last row have to be zero.
        slot_R = place_R.where(place_R < count_e.sum(), -1)
        weighted_RD = combine_rows(out_RD, slot_R[:, None], weight_R[:, None])
        num_tokens = self._num_tokens
        sums_TD = self._library.ep_combine(
            self._buffer, weighted_RD, num_local_tokens=max(num_tokens, 1)
        )[:num_tokens]
        return Returned(sums_TD, self._place_R[:num_tokens, None], self._one_T1[:num_tokens])

    def _num_places(self, limits: Limits) -> int:
        """Return R: the library wants it to be no less than the tokens that a rank sends."""
        return max(limits.received, limits.tokens)

    def _start(self, limits: Limits) -> None:
        setup, library = self._setup, self._library
        if library.is_ep_bootstrapped():
            raise ValueError(
                "moe.dispatch.transport = 'te_ep': Transformer Engine takes MoE layers of one "
                "shape in a process, and this model's differ in their experts, width or top-k, or "
                "another model uses it; set moe.dispatch.transport to auto"
            )
        sizes = {
            "max_tokens_per_rank": limits.tokens,
            "hidden_dim": setup.width,
            "recv_capacity_per_rank": self._num_places(limits),
        }
        try:
            library.ep_bootstrap(
                setup.group.handle,
                num_experts=setup.group.size * setup.most_local,
                num_topk=setup.top_k,
                **sizes,
            )
            self._buffer = library.EpBuffer(
                top_k=setup.top_k,
                num_local_experts=setup.most_local,
                device=setup.device,
                **sizes,
            )
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"moe.dispatch.transport = 'te_ep': NCCL EP cannot start here: {reason}; its ranks "
                "need GPUs with multicast (NVLink switches); set moe.dispatch.transport to auto"
            ) from error

    def _log(self, limits: Limits) -> None:
        setup = self._setup
        if setup.group.rank:
            return
        row = setup.width * setup.dtype.itemsize + 4
        all_places = setup.group.size * limits.tokens * min(setup.top_k, setup.most_local)
        logger.info(
            "moe.dispatch.transport = te_ep: %.1f MiB for at most %d rows received; all tokens of "
            "all ranks would be %d rows, %.1f MiB",
            self._num_places(limits) * row / 2**20,
            self._num_places(limits),
            all_places,
            all_places * row / 2**20,
        )
