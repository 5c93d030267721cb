"""The worker's side of a bench: connect to the bench's socket, one JSON object per line.

Standard library only, because it runs in every peer's own environment. A worker module ends with

    if __name__ == "__main__":
        serve(Worker())

and is started by `candidate.py` as `python -m MODULE SOCKET`, once per rank. Requests
are `{"do": NAME, ...}`: the worker's method NAME is called with the other fields as keywords, and
the reply is its dict or `{"error": traceback}`. `other_commit.py` needs this to stay as it is.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import traceback
from pathlib import Path
from typing import Any


def serve(worker: object) -> None:
    """Reply to requests until the bench closes the socket; each rank has a socket of its own."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(sys.argv[1])
    stream = connection.makefile("rw", encoding="utf-8")
    _send(stream, {"rank": int(os.environ.get("RANK", "0")), "pid": os.getpid()})
    for line in stream:
        request = json.loads(line)
        method = getattr(worker, request.pop("do"))
        try:
            reply = method(**request) or {}
        except Exception:  # the bench reports whatever a peer raises
            _send(stream, {"error": traceback.format_exc()})
            continue
        _send(stream, reply)
    # A peer's own shutdown may wait for a rank that has exited; nothing here needs it.
    os._exit(0)


def memory_mib() -> dict[str, float]:
    """Return resident memory in MiB: `rss_mib` now, `peak_rss_mib` since the process began."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = {"rss_mib": "VmRSS", "peak_rss_mib": "VmHWM"}
    found = {name: re.search(rf"{key}:\s+(\d+) kB", status) for name, key in fields.items()}
    return {name: int(match[1]) / 1024 for name, match in found.items() if match}


def _send(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
