"""Streams that print what can be printed and never raise."""

import errno
import io
import os
import sys

import pytest

from engine.distributed.standard_streams import SafeStream, check_printed, make_safe, safe_streams


class Broken(io.StringIO):
    """A stream whose writes fail until `error` is None."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


def failing(code: int) -> Broken:
    return Broken(OSError(code, os.strerror(code)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EAGAIN, errno.EBADF])
def test_whatever_fails_is_lost_and_what_follows_is_printed(code):
    broken = failing(code)
    stream = SafeStream(broken, 1.0)
    assert stream.write("lost") == 4
    stream.writelines(["lost", "too"])
    stream.flush()
    broken.error = None
    print("kept", file=stream)
    assert broken.getvalue() == "kept\n"
    assert isinstance(stream.failure, OSError) and stream.failure.errno == code


def test_a_closed_stream_loses_text_without_an_error():
    inner = io.StringIO()
    inner.close()
    stream = SafeStream(inner, 1.0)
    stream.write("lost")
    stream.flush()
    assert isinstance(stream.failure, ValueError)


def test_a_loss_is_reported_once_and_a_reader_that_has_ended_is_none():
    for code, expected in (
        (errno.ENOSPC, "standard output: No space left on device; what is printed there is lost\n"),
        (errno.EPIPE, ""),
    ):
        report = io.StringIO()
        stream = SafeStream(failing(code), 1.0, "standard output", report)
        stream.write("a")
        stream.write("b")
        assert report.getvalue() == expected


def test_characters_that_the_encoding_lacks_are_escaped():
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = SafeStream(inner, 1.0)
    stream.write("a é \ud800")
    stream.flush()
    assert inner.buffer.getvalue() == b"a \\xe9 \\ud800"


def test_a_write_waits_for_its_reader_only_once():
    read, write = os.pipe()
    with os.fdopen(write, "w") as inner:
        stream = SafeStream(inner, 0.05)
        stream.write("x" * 200_000)  # more than a pipe holds
        assert isinstance(stream.failure, TimeoutError)
        stream.write("lost")
        os.read(read, 1 << 20)
        stream.write("kept")
        assert os.read(read, 1 << 20) == b"kept"
    os.close(read)


def test_the_streams_are_replaced_for_the_block_and_wrapped_once(monkeypatch):
    out, err = failing(errno.ENOSPC), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with safe_streams():
        own = sys.stdout
        with safe_streams():
            assert sys.stdout is own and make_safe() is own
            print("lost")
        with pytest.raises(ValueError, match="^standard output: No space left on device; print to"):
            check_printed()
    assert sys.stdout is out and sys.stderr is err
    assert "what is printed there is lost" in err.getvalue()


def test_a_process_without_streams_gets_some(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert make_safe() is None
    with safe_streams():
        print("nowhere")
        check_printed()
