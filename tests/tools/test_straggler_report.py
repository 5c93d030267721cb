"""`tools/straggler_report.py`: span files of a run become one page, checked in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
    assert "Two runs" in dom
    assert "rank 0" in dom and "rank 1" in dom and "layer 0" in dom
    assert dom.count("<rect") > page.read_text().count("<rect"), "the script drew nothing"


def drawing(dom: str, name: str) -> ElementTree.Element:
    """The element of that id, with what the script drew in it."""
    found = re.search(rf'<(svg|table|ol|dl) id="{name}".*?</\1>', dom, re.DOTALL)
    assert found is not None, f"{name} is not in the page"
    return ElementTree.fromstring(found[0])


def texts(element: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(each.itertext()).strip() for each in element.iter(tag)]


def bars(dom: str, name: str) -> dict[str, float]:
    """What each bar says when pointed at, and its width."""
    rects = drawing(dom, name).iter("rect")
    return {"".join(each.itertext()): float(each.attrib["width"]) for each in rects}


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """As `spans`, and of the 12 rows of expert 0 capacity drops 3."""
    folder = tmp_path / "dropped"
    folder.mkdir()
    write_rank(folder, 0, experts_ns=3_000_000, kept=(9, 4))
    write_rank(folder, 1, experts_ns=1_000_000, kept=(9, 4))
    return folder


def test_the_page_has_every_view_with_the_spans_numbers(dropped: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run_tool(dropped, "--html", page)
    assert done.returncode == 0, done.stderr
    dom = browse(page, tmp_path / "profile")

    (sentence,) = texts(drawing(dom, "verdict"), "li")
    assert sentence.startswith("Rank 0 on node0 arrived last most often, in 100% of 2 collectives")
    assert sentence in done.stdout, "the terminal says the same"
    assert "Verdict computed from the spans." in dom

    before, after = bars(dom, "heat-before"), bars(dom, "heat-after")
    assert list(before) == [
        "layer 0, expert 0: 24 rows, 1.5 of the mean",
        "layer 0, expert 1: 8 rows, 0.5 of the mean",
    ]
    assert list(after) == [
        "layer 0, expert 0: 18 rows, 1.13 of the mean",
        "layer 0, expert 1: 8 rows, 0.5 of the mean",
    ]
    assert len({*before.values(), *after.values()}) == 1, "all cells are as wide"
    for name, worst in (("heat-before", "1.5x"), ("heat-after", "1.38x")):
        assert texts(drawing(dom, name), "text") == ["layer 0", worst, "rank 0", "rank 1"]
    fills = [each.attrib["fill"] for each in drawing(dom, "heat-after").iter("rect")]
    assert len(set(fills)) == 2, "the colour tells the loads apart"

    stacked = bars(dom, "ranks")
    assert list(stacked) == [
        "rank 0, attention, 2 calls, 16 tokens: 2 ms, 22.2% of its time",
        "rank 0, experts, 2 calls, 16 tokens: 6 ms, 66.7% of its time",
        "rank 0, combine, 2 calls, 16 tokens, 8.19 kB sent: 1 ms, 11.1% of its time",
        "rank 1, attention, 2 calls, 16 tokens: 2 ms, 22.2% of its time",
        "rank 1, experts, 2 calls, 16 tokens: 2 ms, 22.2% of its time",
        "rank 1, combine, 2 calls, 16 tokens, 8.19 kB sent: 1 ms, 11.1% of its time",
        "rank 1, waiting for late ranks: 4 ms, 44.4% of its time",
    ]
    milliseconds = [2, 6, 1, 2, 2, 1, 4]
    unit = list(stacked.values())[0] / 2
    assert list(stacked.values()) == pytest.approx([each * unit for each in milliseconds])
    places = [float(each.attrib["x"]) for each in drawing(dom, "ranks").iter("rect")]
    ends = [x + width for x, width in zip(places, stacked.values(), strict=True)]
    assert places[1:3] + places[4:] == pytest.approx(ends[:2] + ends[3:-1]), "end to end"

    assert list(bars(dom, "layers")) == ["layer 0, combine: a mean rank waited 2 ms"]
    assert texts(drawing(dom, "layers"), "text") == ["outside", "0 \u00b5s", "layer 0", "2 ms"]
    assert texts(drawing(dom, "drops"), "th") == ["layer", "drop rate"]
    assert texts(drawing(dom, "drops"), "td") == ["0", "18.8%"]


def test_the_jobs_report_brings_verdict_facts_and_drops(dropped: Path, tmp_path: Path) -> None:
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
    page = tmp_path / "page.html"
    done = run_tool(dropped, "--report", report, "--html", page)
    assert done.returncode == 0, done.stderr
    dom = browse(page, tmp_path / "profile")
    assert texts(drawing(dom, "verdict"), "li") == ["rank 0 is <slow> & late", "and the link too"]
    assert "From the job's report." in dom
    facts = drawing(dom, "facts")
    assert dict(zip(texts(facts, "dt"), texts(facts, "dd"), strict=True)) == {
        "time": "2.00 s, 2 steps",
        "requests": "10 (5.0 a second)",
        "slowest at equal load": "rank 0 on node0, +50% to its peers",
    }
    heads = ["layer", "drop rate", "dropped", "of", "orphans", "gate mass kept"]
    assert texts(drawing(dom, "drops"), "th") == heads
    assert texts(drawing(dom, "drops"), "td") == ["0", "18.8%", "6", "32", "1", "91.2%"]


def test_a_step_can_be_chosen_by_option_button_and_list(spans: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run_tool(spans, "--html", page).returncode == 0
    whole = page.read_text()

    def shown(name: str, act: str) -> str:
        acting = tmp_path / name
        acting.write_text(whole.replace("</body>", f"<script>{act}</script></body>"))
        return browse(acting, tmp_path / "profile")

    first = shown("first.html", "")
    assert re.findall(r'<option value="(\d)">(\d)</option>', first) == [("0", "1"), ("1", "2")]
    assert '<h2 id="step-title">Step 1: 4.5 ms, of which a mean rank waited 1 ms</h2>' in first
    assert re.search(r'id="previous" disabled', first) and not re.search(r'id="next" dis', first)
    assert list(bars(first, "strip")) == [f"step {n}: waited 1 ms of 4.5 ms" for n in (1, 2)]
    choose = "const list = byId('step'); list.value = '1'; list.dispatchEvent(new Event('change'))"
    for name, act in (("button.html", "byId('next').click()"), ("list.html", choose)):
        dom = shown(name, act)
        assert '<h2 id="step-title">Step 2: ' in dom
        assert re.search(r'id="next" disabled', dom) and not re.search(r'id="previous" dis', dom)
        assert len(list(drawing(dom, "gantt").iter("rect"))) == 7, "both ranks' spans, one waited"
    assert run_tool(spans, "--step", "2", "--html", page).returncode == 0
    assert '<h2 id="step-title">Step 2: ' in browse(page, tmp_path / "profile")


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


def test_a_torn_last_line_is_passed_over_and_named(spans: Path, tmp_path: Path) -> None:
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
