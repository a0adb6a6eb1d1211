"""Reading lines of text files."""

from __future__ import annotations

from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends; raises OSError or UnicodeDecodeError.

    A line ends at a newline (or carriage return and newline) only: U+2028, form feeds and their like, at which
    `str.splitlines` cuts too, are characters of a text. A byte order mark is no part of the first line.
    """
    text = path.read_bytes().decode("utf-8-sig")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
