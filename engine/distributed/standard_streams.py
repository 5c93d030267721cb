"""Standard output and error that never end a job: the disk of a log is full, its reader is gone.

Everything that prints goes through the two streams: tables, progress, tracebacks, the warnings of
other packages. A write that fails is lost and the job goes on, as its results are in files. A
reader that has stopped reading (Ctrl-S, a pager) delays a write by a limited time, not for ever:
the watchdog would declare this rank hung.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_STDOUT_WAIT_S = 10.0  # the summary of a finished job
_STDERR_WAIT_S = 1.0  # progress, while other ranks wait
_CHUNK = 1024  # characters: at most 4096 bytes, for which a pipe that is not full has room


class SafeStream:
    """A text stream whose `write` and `flush` never raise; the rest is the wrapped stream's."""

    def __init__(
        self, stream: TextIO, max_wait_s: float, name: str = "", report_to: Any = None
    ) -> None:
        """Wrap a stream.

        Args:
            stream: to write to.
            max_wait_s: how long a write waits for a reader that does not read.
            name: what it is called in a message.
            report_to: a stream that gets one line when text is lost for the first time, None for
                no line. A reader that has ended is no loss.
        """
        self._stream, self._max_wait_s = stream, max_wait_s
        self._name, self._report_to = name, report_to
        self._is_blocked = False
        self.failure: OSError | ValueError | None = None  # why text was lost for the first time
        try:
            self._fd: int | None = stream.fileno()
        except (AttributeError, OSError, ValueError):
            self._fd = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write and flush, or lose the text; return its length."""
        for start in range(0, len(text), _CHUNK):
            chunk = text[start : start + _CHUNK]
            try:
                self._wait_for_room()
                try:
                    self._stream.write(chunk)
                except UnicodeEncodeError as error:  # the stream's encoding lacks a character
                    escaped = chunk.encode(error.encoding, "backslashreplace")
                    self._stream.write(escaped.decode(error.encoding))
                if self._fd is not None:
                    self._stream.flush()
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._fail(error)
                break
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _wait_for_room(self) -> None:
        """Raise TimeoutError where the reader does not read; the next time without waiting."""
        if self._fd is None:
            return
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        self._is_blocked = not poll.poll(0 if self._is_blocked else 1000 * self._max_wait_s)
        if self._is_blocked:
            raise TimeoutError(errno.ETIMEDOUT, "its reader does not read")

    def _fail(self, error: OSError | ValueError) -> None:
        if self.failure is not None:
            return
        self.failure = error
        if self._report_to is not None and not isinstance(error, BrokenPipeError):
            self._report_to.write(
                f"{self._name}: {_reason(error)}; what is printed there is lost\n"
            )


def make_safe(*, stderr: bool = False) -> TextIO | None:
    """Return standard output or error as a stream that never raises, None where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    # A live display of rich replaces the streams while it is shown.
    stream = getattr(stream, "rich_proxied_file", stream)
    if stream is None or isinstance(stream, SafeStream):
        return cast("TextIO | None", stream)
    if stderr:
        return cast(TextIO, SafeStream(stream, _STDERR_WAIT_S))
    report_to = make_safe(stderr=True)
    return cast(TextIO, SafeStream(stream, _STDOUT_WAIT_S, "standard output", report_to))


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` by streams that never raise, for the time of a block.

    Streams that this process was started without are replaced for good.
    """
    before = sys.stdout, sys.stderr
    make_streams_safe()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = (
            kept or now for kept, now in zip(before, (sys.stdout, sys.stderr), strict=True)
        )


def make_streams_safe() -> None:
    """Replace `sys.stdout` and `sys.stderr` for good, also for the interpreter's last flush."""
    open_missing_streams()
    sys.stderr = cast(TextIO, make_safe(stderr=True))
    sys.stdout = cast(TextIO, make_safe())


def open_missing_streams() -> None:
    """Open /dev/null for the standard streams that were closed when this process was started.

    Otherwise the next file to be opened, such as the ledger, gets the number of standard error, and
    a library's message is written into it.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, fd)
            if null != fd:
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def check_printed() -> None:
    """Flush standard output, for a command whose only result is printed.

    Raises:
        ValueError: what was printed is lost; not where the reader has ended.
    """
    sys.stdout.flush()
    error = getattr(sys.stdout, "failure", None)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise ValueError(
            f"standard output: {_reason(error)}; print to a terminal, a pipe or a file with room"
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
