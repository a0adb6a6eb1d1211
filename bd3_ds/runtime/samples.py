"""Reads and checks the file that `run.py sample --json FILE` writes, for commands that judge or draw texts.

One JSON object a file. Lists have one entry a text; those by token have, in each entry, one for each token of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

ENDS = ("eos", "entropy", "length", "interrupted")  # why a text ended
ROUNDING = 1e-6


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return _is_count(value) and value >= 1


def _is_probability(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and 0 <= value <= 1 + ROUNDING)


OF_FILE: dict[str, Callable[[Any], bool]] = {
    "export": _is_text,
    "objective": _is_text,
    "block_size": _is_size,
    "step": _is_count,
    "length": _is_size,
    "seed": _is_count,
    "options": lambda value: isinstance(value, dict),
}
BY_TEXT: dict[str, Callable[[Any], bool]] = {
    "texts": _is_text,
    "ended": lambda value: value in ENDS,
    "nfe": _is_count,
    "cache_forwards": _is_count,
}
BY_TOKEN: dict[str, Callable[[Any], bool]] = {
    "token_ids": _is_count,
    "pieces": _is_text,
    "order": _is_count,
    "probability": _is_probability,
}


def read_samples(path: Path) -> dict[str, Any]:
    """The object of a sample file; raises UserError for a file that is none, or is cut, and names what is amiss."""
    if path.is_dir():
        raise UserError(f"samples file {path} is a directory; give a file that `run.py sample --json FILE` wrote")
    samples = read_json(path, "samples file")
    problem = _problem(samples)
    if problem:
        raise UserError(f"{path} is no samples file of this version: {problem}; write one with `run.py sample --json`")
    checked: dict[str, Any] = samples
    return checked


def _problem(samples: Any) -> str | None:
    if not isinstance(samples, dict):
        return "it holds no JSON object"
    for name, fits in OF_FILE.items():
        if name not in samples:
            return f"it lacks '{name}'"
        if not fits(samples[name]):
            return f"'{name}' is {samples[name]!r}"
    for name in (*BY_TEXT, *BY_TOKEN):
        if not isinstance(samples.get(name), list):
            return f"it lacks the list '{name}'"
        if not samples[name] or len(samples[name]) != len(samples["texts"]):
            return f"'{name}' has {len(samples[name])} entries for {len(samples['texts'])} texts"
    for name, fits in BY_TEXT.items():
        for value in samples[name]:
            if not fits(value):
                return f"'{name}' holds {value!r}"
    for row, ids in enumerate(samples["token_ids"]):
        for name, fits in BY_TOKEN.items():
            values = samples[name][row]
            if not isinstance(values, list) or len(values) != len(ids):
                return f"'{name}' and 'token_ids' of text {row} are not lists of one length"
            wrong = next((value for value in values if not fits(value)), None)
            if wrong is not None:
                return f"'{name}' of text {row} holds {wrong!r}"
    return None
