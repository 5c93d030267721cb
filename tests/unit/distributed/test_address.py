"""engine/distributed/address.py: an address that is not of rank 0's host is named, with the host's.

python -m pytest tests/unit/distributed/test_address.py
"""

from __future__ import annotations

import socket

import pytest

from engine.distributed import address
from engine.distributed.address import check_address
from engine.distributed.errors import UnreportedError

OTHER = "192.0.2.1"  # for documentation: no host has it (RFC 5737)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def refusal(addr: str, *, listens: bool = True) -> str:
    with pytest.raises(UnreportedError) as caught:
        check_address(addr, free_port(), listens=listens, timeout_s=0.1)
    return str(caught.value)


@pytest.mark.parametrize("addr", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_an_address_of_this_host_is_accepted(addr):
    check_address(addr, free_port(), listens=True, timeout_s=0)


def test_an_address_of_another_host_is_refused_on_rank_0_with_those_of_its_own(monkeypatch):
    monkeypatch.setattr(address, "_CONNECT_S", 0.2)
    text = refusal(OTHER)
    assert text.startswith(f"MASTER_ADDR = {OTHER!r} is no address of {socket.gethostname()}, ")
    assert "set it to one of " in text and "the same on every rank" in text
    check_address(OTHER, free_port(), listens=False, timeout_s=0)


@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize("addr", ["no-such-host.invalid", "", "a b", "x" * 300, "a..b"])
def test_a_name_that_does_not_resolve_is_refused_on_every_rank(addr, listens):
    text = refusal(addr, listens=listens)
    assert text.startswith(f"MASTER_ADDR = {addr!r} does not resolve on {socket.gethostname()} (")


def test_an_address_that_is_forwarded_to_this_host_is_accepted(monkeypatch):
    monkeypatch.setattr(address, "_is_own", lambda each: False)  # as of a service in Kubernetes
    check_address("127.0.0.1", free_port(), listens=True, timeout_s=0)
