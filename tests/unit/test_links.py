"""Every relative link of every Markdown file leads to a file."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `mkdocs build --strict` checks the links between the pages of docs/, and their anchors.
PAGES = [*ROOT.glob("*.md"), *(ROOT / "configs").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = {unquote(target).partition("#")[0] for target in LINK.findall(text)}
    relative = {target for target in targets if target and not re.match(r"[a-z]+:", target)}
    missing = sorted(target for target in relative if not (page.parent / target).exists())
    assert not missing
