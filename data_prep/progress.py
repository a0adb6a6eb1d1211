"""The progress bar of a preparation: part of the source read, tokens, tokens per second, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from data_prep.packing import Encoded, Tally
    from data_prep.parts import Part
    from data_prep.pieces import Position

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
_BAR_WITHOUT_END = "{desc}: {elapsed}{postfix}"


class PreparationProgress:
    """A bar on a terminal, nothing in a file; `position` is moved by what reads the source."""

    def __init__(self, name: str, position: Position):
        self._bar = tqdm(desc=f"preparing {name}", bar_format=_BAR_WITHOUT_END, disable=None, mininterval=0.5)
        self._position, self._start, self._fresh = position, time.perf_counter(), 0

    def watch(self, parts: Iterator[Part], tally: Tally) -> Iterator[Encoded]:
        """The tokens of parts; counts their bytes in `tally`."""
        for part in parts:
            tally.bytes += part.bytes
            self._fresh += len(part.run.ids) * part.fresh
            self._show(tally)
            yield part.run

    def _show(self, tally: Tally) -> None:
        rate = self._fresh / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{tally.tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        if self._position.total:
            self._bar.bar_format, self._bar.total = _BAR, self._position.total
            self._bar.update(self._position.done - self._bar.n)
        else:
            self._bar.update(1)

    def __enter__(self) -> PreparationProgress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()
