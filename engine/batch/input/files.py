"""Input files: what `--input` names, and one plain file of it that all ranks can seek in.

One plain JSONL file is read where it is. Several files, folders, compressed files (gzip, zstd) and
standard input are first written to one file next to the output, `<output>.input.jsonl`, which is
removed when the job is complete. Beside it is a list of what it was made of, so that a run that
resumes uses it as long as the files are the same. Error records name the file and its own line.
"""

from __future__ import annotations

import bisect
import gzip
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from engine.batch.atomic_files import (
    DurableWriter,
    fsync_directory,
    naming,
    read_json,
    write_json,
)
from engine.batch.input.format import check_head, check_is_jsonl
from engine.distributed.health.progress import OnProgress, ignore_progress

STDIN = Path("-")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


class LineNames:
    """Which file and line of the user's a line of the job's one file is."""

    def __init__(self, starts: Sequence[tuple[int, str]] = ()) -> None:
        """Take the number of each file's first line, with its name; none for a single file."""
        self._starts = [start for start, _ in starts]
        self._names = [name for _, name in starts]

    def place(self, number: int) -> tuple[int, str | None]:
        """Return the number of a line in its own file, and that file's name if there are several.

        Args:
            number: of the line in the job's one file, from 1.
        """
        if not self._starts:
            return number, None
        at = bisect.bisect_right(self._starts, number) - 1
        return number - self._starts[at] + 1, self._names[at]

    def describe(self, number: int) -> str:
        """Return where a line is, in words."""
        line, name = self.place(number)
        return f"line {line}" if name is None else f"line {line} of {name}"


class InputFiles:
    """The files of one job."""

    def __init__(self, given: Sequence[Path], output: Path) -> None:
        """Describe them; nothing is read yet.

        Args:
            given: files, folders, or `-` for standard input.
            output: of the job, or of the input shard that is run.
        """
        self.given = list(given)
        self.path = self.given[0]  # the one file to read; final once prepared
        self.spool = output.with_name(f"{output.name}.input.jsonl")
        self._list = output.with_name(f"{output.name}.input.json")
        self._new = self.spool.with_name(self.spool.name + ".tmp")  # the spool until `accept`
        self._entry: dict[str, Any] = {}  # of the list, for the new spool
        self.made = False  # whether this run has written the spool
        self.starts: list[tuple[int, str]] = []  # as `LineNames` takes them

    def prepare(self, report: OnProgress = ignore_progress) -> None:
        """Find or write the one file to read.

        Args:
            report: called once per MiB or so.

        Raises:
            OSError: a file cannot be read or written.
            ValueError: a file is missing, empty standard input, or no JSONL.
        """
        paths = list(self._expand())
        if len(paths) == 1 and paths[0] != STDIN and not _is_compressed(paths[0]):
            check_is_jsonl(paths[0])
            self.path = paths[0]
            return
        self.path = self.spool
        if len(paths) > 1 and STDIN in paths:
            raise ValueError("--input -: standard input cannot be one of several; give it alone")
        sources = [_describe(path) for path in paths]
        found = read_json(self._list)
        fits = found is not None and self.spool.is_file() and found.get("sources") == sources
        fits = fits and found is not None and self.spool.stat().st_size == found.get("size")
        if paths == [STDIN]:
            if sys.stdin.isatty():
                raise ValueError("--input -: standard input is a terminal; pipe requests into it")
            self._write(paths, sources, report, keep_if_empty=fits)
        elif not fits:
            self._write(paths, sources, report)
        if not self.made and found is not None:
            self.starts = [(int(start), str(name)) for start, name in found.get("starts", ())]

    def names(self) -> str:
        """Return what was given, for messages and the manifest."""
        return ", ".join(map(str, self.given))

    @property
    def is_spooled(self) -> bool:
        """Whether the one file to read is a copy."""
        return self.path in (self.spool, self._new)

    def accept(self) -> None:
        """Put what this run has written in the place of an earlier run's: the job will run.

        The list comes last: alone, neither counts. Raises OSError.
        """
        if not self.made:
            return
        self._list.unlink(missing_ok=True)
        os.replace(self._new, self.spool)
        self.path = self.spool
        fsync_directory(self.spool.parent)
        write_json(self._list, self._entry)

    def discard(self) -> None:
        """Remove what this run has written: it is refused, and an earlier one's is still needed."""
        with suppress(OSError):  # the reason why it is refused counts
            self._new.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the spool of a job that is complete."""
        for path in (self._list, self.spool, self._new):
            path.unlink(missing_ok=True)

    def _expand(self) -> Iterator[Path]:
        """Yield the files that are meant, folders replaced by theirs."""
        for path in self.given:
            if path == STDIN:
                yield path
            elif path.is_dir():
                inside = sorted(each for each in path.iterdir() if each.name.endswith(_SUFFIXES))
                if not inside:
                    raise ValueError(f"--input {path}: holds no file *{', *'.join(_SUFFIXES)}")
                yield from inside
            elif path.is_file():
                yield path
            else:
                reason = "is not a regular file" if path.exists() else "does not exist"
                raise ValueError(
                    f"--input {path}: {reason}; give a JSONL file, one request per line"
                )

    def _write(
        self,
        paths: Sequence[Path],
        sources: list[dict[str, Any]],
        report: OnProgress,
        *,
        keep_if_empty: bool = False,
    ) -> None:
        """Write the new spool, which counts when it is accepted."""
        number, starts = 1, []
        try:
            with naming(self._new), self._new.open("wb", buffering=_CHUNK) as file:
                out, size = DurableWriter(file, report), 0
                for path in paths:
                    starts.append((number, str(path)))
                    ends = b"\n"
                    for block in _blocks(path):
                        number += block.count(b"\n")
                        size += len(block)
                        ends = block[-1:]
                        out.write(block)
                        report()
                    if ends != b"\n":
                        out.write(b"\n")
                        number, size = number + 1, size + 1
                out.sync()
            if paths == [STDIN] and not size:
                if keep_if_empty:  # the same job again, without what was piped into it
                    self.discard()
                    return
                raise ValueError("--input -: standard input is empty; pipe requests into it")
        except BaseException:
            self.discard()
            raise
        self.made, self.path = True, self._new
        self.starts = starts if len(paths) > 1 else []
        self._entry = {"sources": sources, "size": size, "starts": self.starts}


def _describe(path: Path) -> dict[str, Any]:
    """Return path, size and time of a file, by which an unchanged one is recognised."""
    if path == STDIN:
        return {"path": "-"}
    stat = path.stat()
    return {"path": str(path.resolve()), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith((_GZIP, _ZSTD))


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield what a file has inside, without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSONL, or its compressed data is damaged.
    """
    with naming(path), _opened(path) as file:
        block = _read(file, path)
        check_head(block, path)
        if block := block.removeprefix(_BOM):
            yield block
        while block := _read(file, path):
            yield block


def _read(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.read(_CHUNK)
    except Exception as error:
        is_damaged = isinstance(error, EOFError | gzip.BadGzipFile | zlib.error)
        if not is_damaged and type(error).__name__ != "ZstdError":
            raise
        why = f"is damaged or cut off ({error})"
        raise ValueError(f"--input {path}: {why}; copy it again") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path == STDIN:
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(_GZIP):
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif magic.startswith(_ZSTD):
            yield _ZstdFrames(file)  # type: ignore[misc]
        else:
            yield file


class _ZstdFrames:
    """Reads a zstd file; unlike the package's own reader, notices that one was cut off."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = _zstd_decompressor()
        self._has_begun = False  # whether the frame has got any data
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return the next bytes, about `size` of them, b"" at the end. Raises EOFError."""
        while True:
            data = self._rest or self._file.read(size // 16)
            self._rest = b""
            if not data:
                if self._has_begun:
                    raise EOFError("it ends inside of a frame")
                return b""
            self._has_begun = True
            block = self._frame.decompress(data)
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame, self._has_begun = _zstd_decompressor(), False
            if block:
                return block


def _zstd_decompressor() -> Any:
    """Return a decompressor of one frame: the standard library's where there is one."""
    try:
        from compression.zstd import ZstdDecompressor  # type: ignore[import-not-found]  # 3.14

        return ZstdDecompressor()
    except ImportError:
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()
