"""What one value may be, beyond its type: rules that stand beside types in `schema.py`: `Annotated[type, rule]`.

A validation library is not used: its sentences would each have to be replaced by ours, which name the key as it is
written on the command line and what would do, and OmegaConf already merges and types the tree. Rules that compare keys
are functions in `check*.py`.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from bd3_ds.runtime.errors import did_you_mean


@dataclass(frozen=True)
class Range:
    """Finite numbers between two ends, `low` and `high` of which `closed` says whether they belong to it.

    `words` stand for numbers outside it. In a list the rule is that of each element.
    """

    low: float
    high: float
    closed: tuple[bool, bool]
    shown: str
    why: str
    words: Mapping[str, int] = field(hash=False)

    def problems(self, key: str, value: Any) -> list[str]:
        """A sentence for each number outside."""
        if isinstance(value, list):
            outside = [one for one in value if not self._holds(one)]
            return [f"{key} holds {one}, and each must {self.must}" for one in outside]
        return [] if self._holds(value) else [f"{key}={value} must {self.must}{self.why and ': ' + self.why}"]

    def _holds(self, value: float) -> bool:
        above = self.low < value or (self.closed[0] and value == self.low)
        below = value < self.high or (self.closed[1] and value == self.high)
        return (above and below) or value in self.words.values()

    @property
    def must(self) -> str:
        """What a number must, for a sentence."""
        return self._interval() + self.or_words

    @property
    def or_words(self) -> str:
        """The words that may stand in place of a number, for the end of a sentence."""
        return "".join(f", or {word}" for word in self.words)

    def _interval(self) -> str:
        if self.shown:
            return f"lie in {self.shown}"
        if self.high < math.inf:
            left, right = "[" if self.closed[0] else "(", "]" if self.closed[1] else ")"
            return f"lie in {left}{self.low:g}, {self.high:g}{right}"
        if self.low == 0:
            return "be finite and not negative" if self.closed[0] else "be finite and above 0"
        return f"be at least {self.low:g}" if self.closed[0] else f"be finite and above {self.low:g}"


@dataclass(frozen=True)
class Choice:
    """One of `known`; in a list each element is."""

    known: tuple[str, ...]

    def problems(self, key: str, value: Any) -> list[str]:
        """A sentence for each unknown name, with the names that may be meant."""
        values = value if isinstance(value, list) else [value]
        return [f"{key}={one} is unknown; {did_you_mean(one, self.known)}" for one in values if one not in self.known]


@dataclass(frozen=True)
class PathText:
    """Text that names a file or directory, in a mapping its values or, with `in_keys`, its keys.

    A leading `~` is expanded, which the shell does not do after `data.train=`. `example` says what to name instead of
    nothing; where it is empty, empty text is not looked at here.
    """

    example: str
    in_keys: bool

    def problems(self, key: str, value: Any) -> list[str]:
        """A sentence where nothing is named."""
        return [f"{key} is empty; name {self.example}"] if self.example and not value.strip() else []


Rule = Range | Choice | PathText


def number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    shown: str = "",
    why: str = "",
    words: Mapping[str, int] | None = None,
) -> Range:
    """Numbers between these ends; `shown` is the interval in a sentence, `why` ends the sentence.

    `words`: what may be written in place of a number, and the number that stands for it.
    """
    low = above if at_least is None else at_least
    high = below if at_most is None else at_most
    closed = (at_least is not None, at_most is not None)
    ends = (-math.inf if low is None else low, math.inf if high is None else high)
    return Range(*ends, closed, shown, why, words or {})


def choice(*known: str) -> Choice:
    """One of these words."""
    return Choice(known)


def path(example: str = "", in_keys: bool = False) -> PathText:
    """The name of a file or directory (PathText)."""
    return PathText(example, in_keys)


def rule_of(annotation: Any) -> Rule | None:
    """The rule in an annotation, that of null's alternative or of a list's elements; None where the type says all."""
    if typing.get_origin(annotation) is Annotated:
        return next(
            (one for one in typing.get_args(annotation)[1:] if isinstance(one, Range | Choice | PathText)), None
        )
    if typing.get_origin(annotation) in (typing.Union, list):
        return next((rule for one in typing.get_args(annotation) if (rule := rule_of(one)) is not None), None)
    return None
