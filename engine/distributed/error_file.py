"""A failing rank's message, in the file that torchrun's agent reads when a worker fails.

torchrun names a file per worker in TORCHELASTIC_ERROR_FILE. Its summary quotes the files of the
workers that failed, and as "Root Cause" the one with the earliest time, in whole seconds. Without
torchrun nothing is written.

The format is the one of torch's own `ErrorHandler`, which takes exceptions alone: a wrong setting
or a rank that is gone would be quoted as a traceback.
(torch.distributed.elastic.multiprocessing.errors)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_FOLLOWS_S = 2  # more than ranks of one host differ by when they learn of one failure


def record_error(
    message: str, *, follows: bool = False, environ: Mapping[str, str] = os.environ
) -> None:
    """Write the message unless this process has written one: the first is the cause.

    Args:
        message: what a reader of torchrun's summary is to see; it may have several lines.
        follows: this rank fails because of another, whose message is to be the root cause.
    """
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    seconds = int(time.time()) + (_FOLLOWS_S if follows else 0)
    data = {"message": {"message": message, "extraInfo": {"timestamp": str(seconds)}}}
    draft = Path(f"{path}.{os.getpid()}")
    with suppress(OSError):  # the disk may be what failed
        draft.write_text(json.dumps(data))
        os.replace(draft, path)  # the agent refuses half a file
