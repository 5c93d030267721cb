"""bench_generate --against and --also: another commit, other settings, and the paired ratios.

python -m pytest tests/tools/test_bench_other_commit.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import bench_generate
import pytest
from bench.candidate import TOOLS, Candidate, WorkerError, start
from bench.generation import COMPARED, generation_candidates, of_commit, with_settings
from bench.generation_tables import paired_ratios, ratio_table
from bench.other_commit import checkout
from bench.report import mean_interval

WORKER = """
import engine
from bench.protocol import serve

class Worker:
    def where(self): return {"age": engine.AGE, "file": engine.__file__}

serve(Worker())
"""
# What setup.py does in this repository, as far as the bench sees it.
SETUP = """
import pathlib, sys
assert sys.argv[1:] == ["build_ext", "--inplace"]
source = pathlib.Path("kernels/csrc/a.cpp").read_text()
if "broken" not in source:
    pathlib.Path("engine/_native.so").write_text("compiled from " + source)
"""


def git(repository: Path, *arguments: str) -> str:
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    command = ["git", "-C", str(repository), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of one commit; its work tree has another engine and a compiled library."""
    root = tmp_path / "repository"
    for folder in ("engine", "kernels/csrc", "tools/bench/workers"):
        (root / folder).mkdir(parents=True)
    (root / "engine/__init__.py").write_text("AGE = 'old'\n")
    (root / "kernels/build.py").write_text("")
    (root / "kernels/csrc/a.cpp").write_text("source")
    (root / "setup.py").write_text(SETUP)
    (root / "tools/bench/__init__.py").write_text("")
    shutil.copy(TOOLS / "bench/protocol.py", root / "tools/bench")
    (root / "tools/bench/workers/where.py").write_text(WORKER)
    (root / ".gitignore").write_text("*.so\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "old")
    (root / "engine/__init__.py").write_text("AGE = 'new'\n")
    (root / "engine/_native.so").write_text("of the work tree")
    return root


def num_worktrees(repository: Path) -> int:
    return len(git(repository, "worktree", "list").splitlines())


def test_the_other_commits_worker_imports_its_own_engine(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    own = Candidate(
        name="own", module="bench.workers.where", python=sys.executable, needs_engine=True
    )
    with checkout("HEAD", repository) as tree:
        other = of_commit(own, "abc", tree.folder)
        assert other.name == "own@abc"
        with start(other, timeout_s=60) as running:
            (reply,) = running.call("where")
    assert reply["age"] == "old"
    assert Path(reply["file"]).is_relative_to(tree.folder)


def test_kernels_are_copied_where_their_sources_are_equal_and_else_compiled(
    repository: Path,
) -> None:
    with checkout("HEAD", repository) as tree:
        assert tree.kernels == "copied"
        assert (tree.folder / "engine/_native.so").read_text() == "of the work tree"
    (repository / "kernels/csrc/a.cpp").write_text("changed")
    with checkout("HEAD", repository) as tree:
        assert tree.kernels == "compiled"
        assert (tree.folder / "engine/_native.so").read_text() == "compiled from source"


def test_the_worktree_is_removed_also_on_failure(repository: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), checkout("HEAD", repository) as tree:
        assert num_worktrees(repository) == 2
        raise RuntimeError("stop")
    assert num_worktrees(repository) == 1 and not tree.folder.exists()
    (repository / "kernels/csrc/a.cpp").write_text("broken")
    git(repository, "commit", "--quiet", "--all", "--message", "kernels that do not compile")
    (repository / "kernels/csrc/a.cpp").write_text("mended")
    with pytest.raises(WorkerError, match="kernels do not compile"), checkout("HEAD", repository):
        pass
    assert num_worktrees(repository) == 1


def test_an_unknown_commit_is_refused_by_name(repository: Path) -> None:
    with pytest.raises(ValueError, match="--against nowhere: must be a commit"):
        with checkout("nowhere", repository):
            pass


def test_ratios_pair_the_rounds() -> None:
    figures = {
        "new": {"total_seconds": {"all": [1.0, 2.0, 4.0]}},
        "old": {"total_seconds": {"all": [2.0, 2.0, 12.0]}},
    }
    ratios = paired_ratios(figures, "new", "old")
    assert ratios["all"] == [2.0, 1.0, 3.0]
    # Their standard deviation is 1; Student's t of two degrees of freedom is 4.303.
    assert ratios["mean"] == 2.0
    assert ratios["high"] - 2.0 == 2.0 - ratios["low"] == pytest.approx(4.303 / 3**0.5)
    assert ratio_table({"new / old": ratios}).splitlines()[2].split() == [
        *["new", "/", "old", "3", "2.0000", "-0.4843", "4.4843"]
    ]


def test_the_interval_of_many_values_nears_the_normal_one() -> None:
    for count, t95 in ((31, 2.042), (61, 2.000), (121, 1.980)):
        values = [0.0, 2.0] * (count // 2) + [1.0]
        margin = mean_interval(values)["high"] - 1.0
        # Their standard deviation is 1: all but one are 1 from the mean.
        assert margin == pytest.approx(t95 / count**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="at least 2 values, not 1"):
        mean_interval([1.0])


def test_several_ratios_are_one_table() -> None:
    ratios = {name: {"all": [1.5, 2.5], "mean": 2.0, "low": 1.0, "high": 3.0} for name in "ab"}
    lines = ratio_table(ratios).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["a", "b"]
    assert lines[4:] == [f"per round, {name}: 1.5000 2.5000" for name in "ab"]


def test_also_is_the_candidate_of_one_rank_with_further_settings() -> None:
    given = ["--also", "model.quantization=int8", "--also", "model.dtype=bfloat16 a.b.c='x y'"]
    options = bench_generate._parse(["--set", "a.b.c=z", *given])
    assert options.also == [
        ("model.quantization=int8",),
        ("model.dtype=bfloat16", "a.b.c=x y"),
    ]
    own = generation_candidates({}, 2, options.set, None)[0]
    other = with_settings(own, options.also[1])
    assert other.name == f"{COMPARED} model.dtype=bfloat16 a.b.c=x y"
    # The last of two values counts.
    assert other.load["settings"] == [*own.load["settings"], *options.also[1]]
    assert (other.ranks, other.threads) == (own.ranks, own.threads)


@pytest.mark.parametrize("text", ["", "int8", "dtype=int8", "model.dtype=", "a.b=c d", "a.b='c"])
def test_also_refuses_what_is_no_setting(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_generate._parse(["--also", text])
    assert f"{text!r}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--contenders", "transformers-eager"], ["--rounds", "1"]], ids=lambda o: o[0]
)
@pytest.mark.parametrize("compare", ["--against HEAD", "--also model.dtype=float32"])
def test_a_comparison_needs_its_own_side_and_two_rounds(compare: str, options: list[str]) -> None:
    with pytest.raises(ValueError, match=compare):
        bench_generate.main([*compare.split(), *options])
