"""Count lines of code of a source tree: blank lines, comments and docstrings are left out.

    python tools/count_lines.py                         # engine/, without engine/ops
    python tools/count_lines.py --at 771224a engine     # the same of another commit
    python tools/count_lines.py engine tools --by-folder

Prints a table of folders (with --by-folder), the total, and one JSON line.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Return how many lines of Python source hold code; docstrings do not count."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout


def sources(folders: list[str], commit: str | None) -> dict[str, str]:
    """Return path -> source of every Python file under `folders`, in the work tree or a commit.

    `engine/ops` is a symbolic link, so its files are counted as kernels/ alone.
    """
    if commit is None:
        paths = _git("ls-files", "--cached", "--others", "--exclude-standard", "--", *folders)
        kept = [path for path in paths.splitlines() if path.endswith(".py")]
        return {path: (ROOT / path).read_text() for path in kept if (ROOT / path).is_file()}
    paths = _git("ls-tree", "-r", "--name-only", commit, "--", *folders)
    return {
        path: _git("show", f"{commit}:{path}")
        for path in paths.splitlines()
        if path.endswith(".py")
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the count; return the exit status."""
    parser = argparse.ArgumentParser(description="Count lines of code per folder")
    parser.add_argument("folders", nargs="*", default=["engine"], help="default: engine")
    parser.add_argument("--at", metavar="COMMIT", help="count this commit, not the work tree")
    parser.add_argument("--by-folder", action="store_true", help="print every folder's count")
    options = parser.parse_args(arguments)
    try:
        found = sources(options.folders, options.at)
    except subprocess.CalledProcessError as error:
        print(f"error: --at {options.at}: {error.stderr.strip()}", file=sys.stderr)
        return 2
    lines, files = Counter(), Counter()
    for path, source in found.items():
        folder = str(PurePosixPath(path).parent)
        lines[folder] += code_lines(source)
        files[folder] += 1
    if options.by_folder:
        print(f"{'folder':32} {'files':>5} {'code lines':>10}")
        for folder in sorted(lines):
            print(f"{folder:32} {files[folder]:5} {lines[folder]:10}")
    total = sum(lines.values())
    print(f"{total} code lines in {len(found)} files of {', '.join(options.folders)}")
    widest = max(files.values(), default=0)
    record = {"commit": options.at, "code_lines": total, "files": len(found)}
    print(json.dumps(record | {"widest_folder_files": widest}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
