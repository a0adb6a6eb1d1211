"""Samples as they were denoised: one page of HTML that needs nothing else, with a slider over the evaluations.

Every token stands in its place from the beginning, blank until it is written, in the colour of the probability that the
model then gave it. Blocks are framed. The page is `denoising.html` beside this file with its marks filled in; without
JavaScript it shows the finished texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.runtime.errors import UserError

TEMPLATE = Path(__file__).with_name("denoising.html")
BINS = (0.01, 0.1, 0.3, 0.7)  # where one colour ends and the next begins; those drawn far from their context lie low
_END_NAMES = {
    "eos": "ended by EOS",
    "entropy": "ended by low entropy",
    "length": "ended by its length",
    "interrupted": "interrupted",
}
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", ord("\n"): "↵\n", ord("\t"): "→\t"}


def denoising_page(samples: dict[str, Any], rows: Sequence[int] | None = None) -> str:
    """The page, of an object that `read_samples` returned, for these texts (default: the first four).

    Raises UserError for a text that is not there.
    """
    count = len(samples["texts"])
    chosen = list(range(min(4, count))) if rows is None else list(rows)
    for row in chosen:
        if not 0 <= row < count:
            raise UserError(f"--rows {row}: the file has the texts 0 … {count - 1}")
    parts = {
        "TITLE": escape(_title(samples)),
        "FACTS": escape(_facts(samples)),
        "LAST": str(max((step for row in chosen for step in samples["order"][row]), default=0)),
        "LEGEND": _legend(),
        "TEXTS": "\n".join(_text(samples, row) for row in chosen),
    }
    # In one pass, so that a token that looks like a mark stays a token.
    return re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], TEMPLATE.read_text(encoding="utf-8"))


def shown(piece: str) -> str:
    """A token as the page shows it: what is invisible in it by a sign, what is no Unicode text by a question mark."""
    return piece.encode("utf-8", "replace").decode().translate(_VISIBLE) or "∅"


def _title(samples: dict[str, Any]) -> str:
    size = f", blocks of {samples['block_size']}" if _has_blocks(samples) else ""
    return f"Denoising: {samples['objective']}{size}"


def _facts(samples: dict[str, Any]) -> str:
    facts = [f"{samples['export']} (step {samples['step']})", f"length {samples['length']}", f"seed {samples['seed']}"]
    facts += [f"{name} {_option(value)}" for name, value in samples["options"].items() if value is not None]
    return " · ".join(facts)


def _option(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _legend() -> str:
    ends = (0.0, *BINS, 1.0)
    names = [f"{low:g} to {high:g}" for low, high in pairwise(ends)]
    colours = [f'<li><span class="t b{tone}">{name}</span></li>' for tone, name in enumerate(names)]
    return (
        "<li>probability when written:</li>"
        + "".join(colours)
        + '<li><span class="t blank">token</span> not yet written</li><li><span class="t given">token</span> given</li>'
        + "<li>pointer, or Tab and arrow keys: one token's order and probability</li>"
    )


def _text(samples: dict[str, Any], row: int) -> str:
    tokens = [
        _token(piece, order, probability)
        for piece, order, probability in zip(
            samples["pieces"][row], samples["order"][row], samples["probability"][row], strict=True
        )
    ]
    size = samples["block_size"]
    if _has_blocks(samples):
        starts = range(0, len(tokens), size)
        tokens = [
            f'<span class="block" data-block="{at // size}">{"".join(tokens[at : at + size])}</span>' for at in starts
        ]
    facts = (
        f"{len(samples['token_ids'][row])} tokens · {_END_NAMES[samples['ended'][row]]} · "
        f"{samples['nfe'][row]} denoiser evaluations, {samples['cache_forwards'][row]} cache-writing forwards"
    )
    return (
        f'<section><h2>Text {row}</h2><p class="facts">{facts} · <span class="count"></span></p>'
        f'<div class="tokens" tabindex="0" role="group" aria-label="Tokens of text {row}">{"".join(tokens)}</div>'
        "</section>"
    )


def _token(piece: str, order: int, probability: float | None) -> str:
    if order == 0:
        kind, number = "given", ""
    elif probability is None:
        kind, number = "", ""
    else:
        kind, number = f"b{sum(probability >= end for end in BINS)}", f' data-p="{probability:.3g}"'
    return f'<span class="t {kind}" data-o="{order}"{number}>{escape(shown(piece))}</span>'


def _has_blocks(samples: dict[str, Any]) -> bool:
    """Whether there is a border to draw: AR's blocks are tokens, those of MDLM and SEDD windows that may overlap."""
    name = samples["objective"]
    return name in OBJECTIVES and OBJECTIVES[name].has_blocks and samples["block_size"] < samples["length"]
