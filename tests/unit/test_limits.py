"""A function fits on a screen and takes what a reader can keep in mind; a file has one subject."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.launch import ROOT

LINES, PARAMETERS, FILE_LINES = 60, 8, 300
# What is over a limit, and why it stays.
KEPT = {
    "bd3_ds/interop/modeling_bd3_ds.py __init__": "transformers builds its configurations from keywords",
    "bd3_ds/model/dit.py _run": "one pass in all its forms: noisy, clean, cached, windowed",
    "bd3_ds/sampling/sampler.py sample": "one batch: what is drawn, from what, how, and who watches",
}


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of every file of the program."""
    for room in ("bd3_ds", "data_prep"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def over() -> Iterator[str]:
    """File and name of every function over a limit."""
    for path, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                taken = len(names) - (bool(names) and names[0].arg in ("self", "cls"))
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LINES or taken > PARAMETERS:
                    yield f"{path} {node.name}"


def test_functions_are_short() -> None:
    assert set(over()) == set(KEPT)


def test_files_are_short() -> None:
    assert {path: lines for path, text in sources() if (lines := len(text.splitlines())) > FILE_LINES} == {}
