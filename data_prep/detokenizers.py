"""Undo the tokenisation that evaluation sets were published with, so that a modern tokenizer sees ordinary text.

Each detokenizer is a list of rules applied in order. Published zero-shot perplexities depend on these rules to the
letter, oddities included (a year like 1 N 1 becomes digits, an "s '" always closes up), so they are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Detokenizer = Callable[[str], str]
Rule = tuple[re.Pattern[str] | str, str]


def _apply(rules: list[Rule]) -> Detokenizer:
    def detokenize(text: str) -> str:
        for find, replacement in rules:
            text = text.replace(find, replacement) if isinstance(find, str) else find.sub(replacement, text)
        return text

    return detokenize


def _closed_up(left: str, right: str) -> Rule:
    """White space just inside a pair of quotes or brackets goes."""
    inside = re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}")
    return inside, rf"{left}\1{right}"


_WIKITEXT: list[Rule] = [
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),  # meant a year after an apostrophe; matches nothing but its own slashes
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(_closed_up(*pair) for pair in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]

_PTB: list[Rule] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *([(" N ", " 1 ")] * 10),  # neighbours share a space, so one pass leaves every other N
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]

_LM1B: list[Rule] = [
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("£ ", "£"),
]


def _lambada(text: str) -> str:
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


DETOKENIZERS: dict[str, Detokenizer] = {
    "none": lambda text: text,
    "ptb": _apply(_PTB),
    "wikitext": _apply(_WIKITEXT),
    "lm1b": _apply(_LM1B),
    "lambada": _lambada,
    "papers": _apply(_WIKITEXT + _LM1B),
}
