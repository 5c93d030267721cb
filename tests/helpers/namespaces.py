"""Hosts that are network namespaces of this machine, joined by a bridge, each with a real sshd.

    with VirtualHosts(2) as hosts:
        done = hosts.run("host1", ["ssh", "host2", "hostname"], timeout_s=10)

A host has its own network, host name, /etc/hosts, /run and process ids; files are shared, as on a
cluster's file system. Each host is held by one process that dies with this one, so nothing is left
behind however this process ends. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

# The programs that hosts are made of and Debian's packages that hold them.
_PACKAGE_OF = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
}
_NETWORK = "10.77.0"
_SPACES = ("--net", "--uts", "--mount", "--pid")
_SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # the daemons' folder on Debian
_WAIT_S = 10.0

# $1: the host's name. $2: its /etc/hosts.
_BEGIN = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs none /run && mkdir /run/sshd &&
ip link set lo up && echo ready && exec sleep infinity
"""
_SSHD = """\
HostKey {dir}/host_key
AuthorizedKeysFile {dir}/user_key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""
_SSH = """\
IdentityFile {dir}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
GlobalKnownHostsFile /dev/null
ConnectionAttempts 10
LogLevel ERROR
"""


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    output: str  # stdout and stderr


def why_no_hosts(**more: str) -> str:
    """Return what is missing to create virtual hosts, "" for nothing.

    more: further programs and their packages; a program's underscore replaces a dot.
    """
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    packages = _PACKAGE_OF | {name.replace("_", "."): package for name, package in more.items()}
    missing = {package for name, package in packages.items() if not which(name)}
    return f"apt-get install {' '.join(sorted(missing))}" if missing else ""


def which(program: str) -> str | None:
    """Return the program's path, searching root's folders too."""
    return shutil.which(program, path=_SEARCH_PATH)


class VirtualHosts:
    """Context manager: hosts host1, host2, ... at 10.77.0.1, ...

    They resolve each other's names, and ssh needs no password.
    """

    def __init__(self, num_hosts: int) -> None:
        self.names = [f"host{number}" for number in range(1, num_hosts + 1)]
        self.dir = Path(tempfile.mkdtemp(prefix="hosts-"))
        self._holders: list[subprocess.Popen[str]] = []
        self.processes: list[int] = []  # the first process of the bridge's and each host's own
        self._pid_of: dict[str, int] = {}

    def __enter__(self) -> VirtualHosts:
        with ExitStack() as undo:
            undo.callback(self._stop)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout_s: float,
    ) -> Done:
        """Run a command on a host until it ends; what it has started lives until the hosts stop.

        Raises:
            RuntimeError: it has not ended within `timeout_s`; with its output.
        """
        command = [*self._enter(host), "env", f"--chdir={folder or self.dir}", *argv]
        environ = {**os.environ, **(environ or {})}
        environ["PATH"] = f"{self.dir}:{environ.get('PATH', '')}"  # the `ssh` that knows the keys
        # A file and not a pipe: a pipe would last as long as the last process that holds it.
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                log.seek(0)
                raise RuntimeError(f"{argv[0]}: not within {timeout_s} s:\n{log.read()}") from None
            log.seek(0)
            return Done(process.returncode, log.read())

    def _start(self) -> None:
        hosts_file = self.dir / "hosts"
        addresses = {name: f"{_NETWORK}.{number}" for number, name in enumerate(self.names, 1)}
        lines = [f"{address} {name}\n" for name, address in addresses.items()]
        hosts_file.write_text("127.0.0.1 localhost\n" + "".join(lines))
        for key in ("host_key", "user_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.dir / key))
        (self.dir / "sshd_config").write_text(_SSHD.format(dir=self.dir))
        (self.dir / "ssh_config").write_text(_SSH.format(dir=self.dir))
        wrapper = self.dir / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {which("ssh")} -F {self.dir}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        switch = self._hold("switch", hosts_file)
        in_switch = ["nsenter", f"--target={switch}", "--net", "ip", "link"]
        _call(*in_switch, "add", "bridge", "type", "bridge")
        _call(*in_switch, "set", "bridge", "up")
        for name, address in addresses.items():
            pid = self._pid_of[name] = self._hold(name, hosts_file)
            peer = ["peer", "name", "eth0", "netns", str(pid)]
            _call(*in_switch, "add", name, "type", "veth", *peer)
            _call(*in_switch, "set", name, "master", "bridge", "up")
            _call(*self._enter(name), "ip", "address", "add", f"{address}/24", "dev", "eth0")
            _call(*self._enter(name), "ip", "link", "set", "eth0", "up")
            sshd = str(which("sshd"))  # insists on an absolute path
            _call(*self._enter(name), sshd, "-f", str(self.dir / "sshd_config"))

    def _hold(self, name: str, hosts_file: Path) -> int:
        """Start the process that holds a host's namespaces; return its id."""
        unshare = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc"]
        begin = ["sh", "-c", _BEGIN, "sh", name, str(hosts_file)]
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *unshare, *begin],
            env=os.environ | {"PATH": _SEARCH_PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} could not be made: exit code {holder.wait()}")
        (child,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        self.processes.append(int(child))
        return int(child)

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", f"--target={self._pid_of[name]}", *_SPACES]

    def _stop(self) -> None:
        for holder in self._holders:
            holder.kill()  # which kills the first process of the host, and that one all others
        for holder in self._holders:
            holder.wait()
            if holder.stdout is not None:
                holder.stdout.close()
        deadline = time.monotonic() + _WAIT_S
        while any(map(_alive, self.processes)) and time.monotonic() < deadline:
            time.sleep(0.01)
        shutil.rmtree(self.dir, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Return whether a process has not ended; a zombie, which its parent has yet to reap, has."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _call(*command: str) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": _SEARCH_PATH},
        timeout=_WAIT_S,
    )
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
