"""`run.py denoising SAMPLES.json --out PAGE.html`: a page that shows samples being denoised."""

from __future__ import annotations

from pathlib import Path

from bd3_ds.report.denoising import denoising_page
from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable, write_text
from bd3_ds.runtime.samples import read_samples


def main(argv: list[str]) -> int:
    """Write the page and say where."""
    parser = Parser(prog="run.py denoising", description="A page of HTML that shows samples being denoised.")
    add = parser.add_argument
    add("samples", type=Path, metavar="SAMPLES.json", help="file of `run.py sample --json`")
    add("--out", type=Path, required=True, metavar="PAGE.html", help="one file; it needs no network")
    add("--rows", metavar="R,…", help="which texts, from 0 (default: the first four)")
    options = parser.parse(argv)
    rows = _rows(options.rows) if options.rows is not None else None
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a directory; give a file, such as {options.out / 'denoising.html'}")
    page = denoising_page(read_samples(options.samples), rows)
    require_writable(options.out.resolve().parent)
    write_text(options.out, page)
    print(f"written to {options.out} ({len(page.encode()) / 1e3:.0f} kB); open it in a browser")
    return 0


def _rows(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--rows {text} must be whole numbers from 0, separated by commas, such as 0,1")
    return list(dict.fromkeys(int(word) for word in words))
