"""Errors shared between ranks: a fault of one rank fails the run, which never hangs.

For a fault that a rank may find alone (in its config, its files, its GPU) before the next
collective, which the others would enter without it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Group

# What torch says of an allocation that fails.
_OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "invalid storage size",
    "Storage size calculation overflowed",
)

# What torch says of a GPU, a kernel on it or a driver that fails.
_OF_THE_GPU = ("CUDA error", "CUDA driver", "CUBLAS", "CUDNN", "HIP error")


class RankError(ValueError):
    """An error found by some ranks and raised, with the same text, by all."""


class UnreportedError(ValueError):
    """An error of this rank that the others do not know of, so rank 0 cannot report it."""


class RendezvousError(RuntimeError):
    """Ranks are missing at the rendezvous: raised by those that joined, each for itself."""

    exit_code = 1


@contextmanager
def memory_in_words(problem: str) -> Iterator[None]:
    """Turn an allocation that fails inside into a ValueError that begins with `problem`.

    For what a setting sizes: the text names the setting and what to do. Other errors are kept.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, OSError) as error:
        text = str(error)
        # torch has a type of its own on CUDA alone; on the CPU it is a RuntimeError.
        if not (
            isinstance(error, MemoryError | OverflowError)
            or getattr(error, "errno", None) == errno.ENOMEM
            or any(words in text for words in _OUT_OF_MEMORY)
        ):
            raise
        why = text.splitlines()[0] if text else "out of memory"
        raise ValueError(f"{problem} ({why})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice, of the host or of a device."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def describe_device_error(error: BaseException, host: str) -> str | None:
    """Return what to say of an error of memory or of the GPU, with what to do; None: it is another.

    Args:
        error: what was raised.
        host: of this rank.
    """
    why = (str(error).splitlines() or ["out of memory"])[0]
    if is_out_of_memory(error):
        return (
            f"{host}: {why}; lower scheduler.max_batch_tokens or scheduler.kv_cache_gib, use more "
            "ranks, or end what else uses the memory there"
        )
    if isinstance(error, RuntimeError) and any(name in why for name in _OF_THE_GPU):
        return f"{host}: {why}; look at nvidia-smi and the kernel's log there"
    return None


def raise_on_any_rank(
    group: Group, error: str | None, exception: type[ValueError] = RankError
) -> None:
    """Raise `exception` on every rank if any rank passes an error.

    Collective over `group`: every rank must call.
    """
    errors = dict(zip(group.ranks, gather_objects(error, group), strict=True))
    if found := {rank: text for rank, text in errors.items() if text is not None}:
        raise exception(merge_errors(found, group.size))


def merge_errors(
    errors: Mapping[int, str], num_ranks: int, hosts: Sequence[str] | None = None
) -> str:
    """Return one text for several errors: each distinct error once, after the ranks that have it.

    Args:
        errors: by global rank.
        num_ranks: of the group; an error that all of them have is returned without their names.
        hosts: of all ranks by rank, to be named too.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, text in sorted(errors.items()):
        ranks_of.setdefault(text, []).append(rank)
    if len(errors) == num_ranks and len(ranks_of) == 1:
        return next(iter(ranks_of))

    def who(ranks: Sequence[int]) -> str:
        if hosts is None:
            return name_ranks(ranks)
        names = list(dict.fromkeys(hosts[rank] for rank in ranks))
        more = f", ... ({len(names)})" if len(names) > 4 else ""
        return f"{name_ranks(ranks)} on {', '.join(names[:4])}{more}"

    return "\n".join(f"{who(ranks)}: {text}" for text, ranks in ranks_of.items())


def name_ranks(ranks: Sequence[int]) -> str:
    """Return ranks as text, at most eight: `rank 3`, `ranks 0, 2`, `ranks 0, 1, ... (64)`."""
    shown = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)})" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
