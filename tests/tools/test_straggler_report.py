"""`tools/straggler_report.py`: span files of a run become one page, checked in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "straggler_report.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHASES = ["attention", "gate", "consensus", "plan", "dispatch", "experts", "combine"]
PHASES += ["other", "control"]


def write_rank(
    folder: Path,
    rank: int,
    *,
    experts_ns: int,
    host: str = "node",
    kept: tuple[int, int] = (12, 4),
) -> Path:
    """Two steps of one layer on one of two ranks: attention, experts, then combine. kept: rows of
    the two experts after capacity, of 12 and 4.
    """
    header = {
        "format": "lockstep-spans",
        "version": 1,
        "rank": rank,
        "host": f"{host}{rank}",
        "world_size": 2,
        "group": [0, 1],
        "clock_offset_ns": 0,
        "clock_error_ns": 1000,
        "phases": PHASES,
        "num_layers": 1,
        "num_experts": 2,
        "first_expert": rank,
        "num_local_experts": 1,
        "policy": "none",
    }
    waited = max(0, 3_000_000 - experts_ns)
    lines = [json.dumps(header)]
    for step in (1, 2):
        spans = [
            [PHASES.index("attention"), 0, 0, 1_000_000, 8, 0, 0],
            [PHASES.index("experts"), 0, 1_000_000, experts_ns, 8, 0, 0],
            [PHASES.index("combine"), 0, 1_000_000 + experts_ns, 500_000 + waited, 8, 4096, waited],
        ]
        record = {"step": step, "start_ns": step * 10_000_000, "prefill": 8, "decode": 0}
        loads = {"before": {"0": [12, 4]}, "after": {"0": [kept[rank]]}}
        lines.append(json.dumps({**record, "spans": spans, **loads}))
    path = folder / f"spans.rank{rank:05d}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def spans(tmp_path: Path) -> Path:
    """The span files of a run whose rank 0 works three times as long as rank 1."""
    folder = tmp_path / "slow"
    folder.mkdir()
    write_rank(folder, 0, experts_ns=3_000_000)
    write_rank(folder, 1, experts_ns=1_000_000)
    return folder


def run_tool(*args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, args)], capture_output=True, text=True, timeout=60
    )


def browse(page: Path, profile: Path) -> str:
    """The page's DOM after its script has run in headless chromium."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    flags += (
        f" --disable-background-networking --virtual-time-budget=3000 --user-data-dir={profile}"
    )
    command = [CHROMIUM, *flags.split(), "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90).stdout


def page_data(*args: Any, page: Path) -> dict[str, Any]:
    """What the page draws, from a run of the tool."""
    done = run_tool(*args, "--html", page)
    assert done.returncode == 0, done.stderr
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert block is not None
    return {**json.loads(block[1]), "printed": done.stdout}


def test_the_page_draws_steps_ranks_loads_and_two_runs_in_a_browser(
    spans: Path, tmp_path: Path
) -> None:
    even = tmp_path / "even"
    even.mkdir()
    for rank in (0, 1):
        write_rank(even, rank, experts_ns=1_000_000)
    page = tmp_path / "page.html"
    done = run_tool(spans, "--compare", even, "--html", page)
    assert done.returncode == 0, done.stderr
    dom = browse(page, tmp_path / "profile")
    assert 'data-ready="yes"' in dom, "the page's script did not reach its end"
    assert "Finding computed from the spans." in dom and "Two runs" in dom
    assert dom.count("<rect") > page.read_text().count("<rect"), "the script drew nothing"


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """As `spans`, and of the 12 rows of expert 0 capacity drops 3."""
    folder = tmp_path / "dropped"
    folder.mkdir()
    write_rank(folder, 0, experts_ns=3_000_000, kept=(9, 4))
    write_rank(folder, 1, experts_ns=1_000_000, kept=(9, 4))
    return folder


def test_the_page_has_the_spans_numbers(dropped: Path, tmp_path: Path) -> None:
    data = page_data(dropped, page=tmp_path / "page.html")
    (sentence,) = data["findings"]
    assert sentence.startswith("Rank 0 on node0 arrived last most often, in 100% of 2 collectives")
    assert sentence in data["printed"], "the terminal prints the same"
    loads = data["loads"]
    assert (loads["before"], loads["after"]) == ([[24, 8]], [[18, 8]])
    assert loads["imbalance"] == [[1.5, round(18 / 13, 4)]]
    # Milliseconds of both steps: rank 0 computes 6 and rank 1 2, and waits 4 in combine.
    by_phase = [dict(zip(data["phases"], each, strict=True)) for each in data["totals"]["seconds"]]
    for seconds, experts, combine in zip(by_phase, (6e-3, 2e-3), (1e-3, 5e-3), strict=True):
        assert (seconds["attention"], seconds["experts"]) == (2e-3, experts)
        assert seconds["combine"] == combine and sum(seconds.values()) == pytest.approx(9e-3)
    assert [sum(each) for each in data["totals"]["waiting"]] == [0.0, 4e-3]
    lost = dict(zip(data["phases"], data["layers"]["lost"][-1], strict=True))
    assert data["layers"]["layer"] == [-1, 0] and lost["combine"] == 2e-3
    assert data["drops"]["layers"] == [{"layer": 0, "drop_rate": 0.1875}]


def test_findings_facts_and_drops_are_those_of_a_report(dropped: Path, tmp_path: Path) -> None:
    layer = {"layer": 0, "assignments": 32, "dropped": 6, "orphans": 1, "drop_rate": 0.1875}
    run = {
        "ranks": [{"rank": 0, "host": "node0", "slowness": 1.5}, {"rank": 1, "host": "node1"}],
        "layers": [{**layer, "gate_mass_kept": 0.912}],
        "verdict": [{"text": "rank 0 is <slow> & late"}, {"text": "and the link too"}],
        "seconds": 2.0,
        "steps": 2,
    }
    report = tmp_path / "out.report.json"
    report.write_text(json.dumps({"run": run, "requests": 10}))
    data = page_data(dropped, "--report", report, page=tmp_path / "page.html")
    assert data["findings"] == ["rank 0 is <slow> & late", "and the link too"]
    assert dict(data["facts"]) == {
        "time": "2.00 s, 2 steps",
        "requests": "10 (5.0 per second)",
        "slowest at equal load": "rank 0 on node0, +50% to its peers",
    }
    assert data["drops"]["layers"] == [{**layer, "gate_mass_kept": 0.912}]


def test_the_step_with_most_waiting_is_shown_unless_one_is_chosen(
    spans: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    steps = page_data(spans, page=page)["steps"]
    assert (steps["number"], steps["shown"]) == ([1, 2], 0)
    assert steps["length"] == [4.5e-3, 4.5e-3] and steps["lost"] == [1e-3, 1e-3]
    assert page_data(spans, "--step", "2", page=page)["steps"]["shown"] == 1


def test_the_page_needs_no_network(spans: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run_tool(spans, "--html", page).returncode == 0
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s\"'<]*", page.read_text()))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:link|script|img)[^>]+(?:src|href)=", page.read_text())


def test_names_in_the_spans_cannot_end_the_pages_script(tmp_path: Path) -> None:
    for rank in (0, 1):
        write_rank(tmp_path, rank, experts_ns=1_000_000, host="</script><script>alert(1)//")
    page = tmp_path / "page.html"
    assert run_tool(tmp_path, "--html", page).returncode == 0
    assert "</script><script>alert" not in page.read_text()


def test_a_torn_last_line_is_ignored_and_named(spans: Path, tmp_path: Path) -> None:
    with (spans / "spans.rank00001.jsonl").open("a") as file:
        file.write('{"step": 3, "start_ns": 30')
    page = tmp_path / "page.html"
    done = run_tool(spans, "--html", page)
    assert done.returncode == 0, done.stderr
    assert "spans.rank00001.jsonl" in page.read_text() + done.stdout + done.stderr


def test_a_broken_line_is_refused_by_file_and_line(spans: Path) -> None:
    path = spans / "spans.rank00000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{nonsense", *lines[1:]]) + "\n")
    done = run_tool(spans)
    assert done.returncode != 0
    assert "spans.rank00000.jsonl" in done.stderr and "2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_spans_is_refused_by_name(tmp_path: Path) -> None:
    done = run_tool(tmp_path)
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr and "Traceback" not in done.stderr


def test_the_trace_has_every_rank_on_one_timeline(spans: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = run_tool(spans, "--trace", trace, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    value = json.loads(trace.read_text())
    events = value["traceEvents"] if isinstance(value, dict) else value
    drawn = [event for event in events if event["ph"] == "X"]
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    assert {event["pid"] for event in drawn} == named and len(named) == 2
    experts = [event for event in drawn if event["name"].startswith("experts")]
    assert {event["dur"] for event in experts} == {1000.0, 3000.0}
