"""Straggler report: which rank the others waited for, when and after what, as page and trace.

    python tools/straggler_report.py RUN_DIR                        # RUN_DIR/straggler_report.html
    python tools/straggler_report.py RUN_DIR --report out.report.json --html page.html
    python tools/straggler_report.py RUN_DIR --compare OTHER_DIR    # two runs compared
    python tools/straggler_report.py RUN_DIR --trace trace.json     # the trace alone

RUN_DIR is the folder that profiler.spans named in a job, with the span files of all ranks; files
from several hosts are copied into one folder. The page is one file that loads nothing: a Gantt of
a step, each rank's time by phase, loads before and after capacity, waiting by layer, drops. The
trace opens in ui.perfetto.dev or chrome://tracing, all ranks on one timeline.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a checkout needs no install

from straggler.aggregate import loads, times
from straggler.arrival_skew import arrival_skew, sentence
from straggler.compare import Measures
from straggler.data import index_of, page_data
from straggler.page import page
from straggler.read import read_run
from straggler.report import read_report
from straggler.run import Group
from straggler.trace import write_trace

PAGE = "straggler_report.html"


def measure(group: Group) -> Measures:
    """Add up a group's spans and loads."""
    return Measures(group, times(group), loads(group))


def main(argv: Sequence[str] | None = None) -> int:
    """Write page and trace; return the exit code.

    Raises:
        ValueError: something cannot be read, written or shown; the message names what to do.
    """
    options = _parse(argv)
    run = read_run(options.run)
    group = run.group(options.rank)
    if options.step is not None:
        index_of(group, options.step)
    measures = measure(group)
    finding = sentence(group, measures.times, arrival_skew(group))
    report = None
    if options.report is not None:
        report = read_report(options.report, group.ranks[0].header.world_size)
    other = None
    if options.compare is not None:
        other = measure(read_run(options.compare).group())
    print(finding)
    notes = list(group.notes)
    if options.html is not None or options.trace is None:
        path = options.html or options.run / PAGE
        data = page_data(measures, finding, report=report, other=other, step=options.step)
        _write(path, page(data))
        print(f"page: {path}")
    if options.trace is not None:
        note = write_trace(run, options.trace, around=options.step)
        notes += [note] if note else []
        print(f"trace: {options.trace}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written: {error.strerror}; name another file with --html"
        ) from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of span files")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="another run's span files")
    parser.add_argument("--report", type=Path, metavar="JSON", help="the job's *.report.json")
    parser.add_argument("--html", type=Path, help=f"default: RUN_DIR/{PAGE}, unless --trace")
    parser.add_argument("--trace", type=Path, metavar="JSON", help="Chrome trace of all ranks")
    parser.add_argument("--step", type=int, metavar="N", help="default: the one that lost most")
    parser.add_argument("--rank", type=int, metavar="N", help="show this rank's lockstep group")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
