"""What README.md and docs/ point to is there, and what they tell readers to type exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bd3_ds.cli import MODES
from tests.helpers.launch import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def linked(page: Path) -> list[Path]:
    """Files of ours that a page links to or shows."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    return [(page.parent / place).resolve() for place in found if "://" not in place]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    assert [place for place in linked(page) if not place.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modes_that_are_named_are_modes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:bd3-ds|run\.py|run\.sh) ([a-z][a-z-]+)(?=[ `…]|$)", text, re.MULTILINE)
    assert set(named) <= {*MODES, "setup", "test"}


def test_every_page_is_in_the_index() -> None:
    index = set(linked(ROOT / "docs/README.md"))
    assert {path for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"} <= index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_code_that_are_named_are_there(page: Path) -> None:
    """Such as `bd3_ds/train/step.py`, `train/step.py` or `configs/base.yaml` in backticks."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:bd3_ds|data_prep|benchmarks|tests|configs|ds_configs|[a-z_]+)/[\w/.-]+\.(?:py|yaml|json))`", text
    )
    gone = [
        name
        for name in named
        if not any((ROOT / base / name).exists() for base in ("", "bd3_ds", "benchmarks/reports"))
        and not name.startswith(("runs/", "records/", "checkpoints/", "exports/"))
        and "NAME" not in name
    ]
    assert gone == []
