"""Files of prompts and of reference texts are read line by line as data_prep reads them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from bd3_ds.commands import sample as sample_command
from bd3_ds.evaluation.text import quality
from bd3_ds.runtime.text_files import read_lines
from data_prep.sources import open_source

LINES = ["The function\u2028returns", "A list\x0c of", "", "Raises an\x0berror\x85\x1c", "last"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_end_at_newlines_alone(tmp_path: Path, end: str, last: bool) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(("\ufeff" + end.join(LINES) + (end if last else "")).encode())
    assert read_lines(file) == LINES
    assert sample_command._read_prompts(Namespace(prompt=None, prompts=file)) == LINES


def test_reference_texts_are_those_that_prepare_reads(tmp_path: Path) -> None:
    file = tmp_path / "reference.jsonl"
    texts = [line for line in LINES if line]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_bytes(("\ufeff" + "\r\n".join(rows) + "\r\n").encode())
    assert quality.read_texts(file) == texts == [piece.text for piece in open_source(str(file)).pieces()]


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    assert read_lines(tmp_path / "a") == []
    (tmp_path / "a").write_text("\n")
    assert read_lines(tmp_path / "a") == [""]
