"""Rendezvous address: whether MASTER_ADDR is of the host of rank 0, which listens there.

Checked before the store is opened: torch retries a wrong address until it times out, then prints
C++ stacks that do not say what is wrong. An address may become right while a job starts (a name of
a pod that is not ready yet), so it is tried for a while.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence

from engine.distributed.errors import UnreportedError

_POLL_S = 0.2
_CONNECT_S = 2.0


def check_address(addr: str, port: int, *, listens: bool, timeout_s: float) -> None:
    """Check that an address resolves and, on rank 0, that it leads to this host.

    Args:
        addr: MASTER_ADDR, or what the launcher has in its place.
        port: MASTER_PORT.
        listens: whether this rank will listen there.
        timeout_s: how long to try.

    Raises:
        UnreportedError: it does not; the text names the variable, its value and this host.
    """
    deadline, host = time.monotonic() + timeout_s, socket.gethostname()
    while isinstance(found := _resolve(addr), str):
        if time.monotonic() >= deadline:
            raise UnreportedError(
                f"MASTER_ADDR = {addr!r} does not resolve on {host} ({found}): set it to a name "
                "or address of the host of rank 0 that every host can reach"
            )
        time.sleep(_POLL_S)
    if not listens or any(_is_own(each) for each in found):
        return
    # Not of this host, but it may be forwarded to it (a container's port, a Kubernetes service).
    while not _leads_here(addr, port):
        if time.monotonic() >= deadline:
            raise UnreportedError(
                f"MASTER_ADDR = {addr!r} is no address of {host}, where rank 0 runs and listens: "
                f"set it to one of {', '.join(_own_addresses()) or host}, the same on every rank, "
                "or start rank 0 on the host that it names"
            )
        time.sleep(_POLL_S)


def _resolve(addr: str) -> list[tuple[int, str]] | str:
    """Return the family and address of each meaning of a name, or why there is none."""
    if not addr.strip():
        return "it is empty"
    try:
        found = socket.getaddrinfo(addr, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return [(family, str(place[0])) for family, _, _, _, place in found]


def _is_own(address: tuple[int, str]) -> bool:
    """Return whether this host has an address: only then can a socket be bound to it."""
    family, place = address
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((place, 0))
    except OSError:
        return False
    return True


def _leads_here(addr: str, port: int) -> bool:
    """Return whether a connection to an address arrives at this host's port."""
    token = secrets.token_bytes(16)
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen()
            listener.settimeout(_CONNECT_S)
            with socket.create_connection((addr, port), _CONNECT_S) as client:
                client.sendall(token)
                arrived, _ = listener.accept()
                with arrived:
                    arrived.settimeout(_CONNECT_S)
                    return arrived.recv(len(token)) == token
    except OSError:
        return False


def _own_addresses() -> Sequence[str]:
    """Return the host's name where it resolves to the host, and the address of its route."""
    found, name = [], socket.gethostname()
    meanings = _resolve(name)
    if not isinstance(meanings, str) and any(_is_own(each) for each in meanings):
        found.append(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing: looks up the route's own address
            found.append(probe.getsockname()[0])
        except OSError:  # no route at all
            pass
    return found
