"""Windows over texts longer than the context, in which each token is scored once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bd3_ds.config.check import EXACT_ALWAYS
from bd3_ds.config.registries import OBJECTIVES

FILL = 32  # tokens; texts of nearly one length go together where what follows a text does not matter


@dataclass(frozen=True)
class Piece:
    """Tokens that a network sees at once, of which all but the first `given` are scored for text number `text`.

    `start` is where the first of them stands in the text.
    """

    tokens: list[int]
    given: int
    text: int
    start: int = field(default=0, compare=False)


@dataclass(frozen=True)
class TextWindows:
    """Windows of at most `length` tokens over texts of a model that denoises `block_size` tokens together."""

    length: int
    block_size: int

    @property
    def one_block(self) -> bool:
        """Whether a text is a single block, as long as the text itself, or all `length` of it."""
        return self.block_size == self.length

    @property
    def grid(self) -> int:
        """Windows begin at its multiples, so that a text's blocks are the same in all of them."""
        return 1 if self.one_block else self.block_size

    def pieces(self, tokens: list[int], given: int, text: int = 0) -> Iterator[Piece]:
        """Windows over `tokens`, in which each token after the `given` first is scored once.

        Each has at least one token before the first that is scored, and otherwise begins as late as that they are as
        few as can be; the last has as much context as it holds.
        """
        done = given
        while done < len(tokens):
            latest = (done - 1) // self.grid * self.grid
            start = min(latest, self.on_grid(len(tokens) - self.length))
            stop = min(len(tokens), start + self.length)
            yield Piece(tokens[start:stop], done - start, text, start)
            done = stop

    def width(self, tokens: int) -> int:
        """What a text of so many tokens is filled up to: nobody sees what comes after, but in a single block."""
        step = 1 if self.one_block else self.grid * max(1, FILL // self.grid)
        return tokens if tokens > self.length else min(self.length, -(-tokens // step) * step)

    def on_grid(self, tokens: int) -> int:
        """The least multiple of the block size that is not below `tokens`; 0 for less."""
        return max(0, -(-tokens // self.grid) * self.grid)

    def estimator(self, piece: Piece, objective: str, masks: int = EXACT_ALWAYS) -> str:
        """What scores a piece, by its own tokens only: exact where no block has more than so many to score."""
        facts = OBJECTIVES[objective]
        if facts.causal or not facts.can_be_exact:
            return "exact" if facts.causal else facts.sampled_estimator
        size = len(piece.tokens) if self.one_block else self.grid
        block = [0] * -(-len(piece.tokens) // size)
        for place in range(piece.given, len(piece.tokens)):
            block[place // size] += 1
        return "exact" if max(block) <= min(masks, EXACT_ALWAYS) else facts.sampled_estimator


def filled(rows: list[list[int]], mask_id: int, width: int | None = None) -> Tensor:
    """Rows of tokens as [N, width], filled up with the mask id; None: the longest row's length."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([row + [mask_id] * (width - len(row)) for row in rows])


def places(pieces: list[Piece], width: int) -> Tensor:
    """Where the pieces' scored tokens stand, boolean [N, width]."""
    place = torch.arange(width)
    begin = torch.tensor([piece.given for piece in pieces])[:, None]
    end = torch.tensor([len(piece.tokens) for piece in pieces])[:, None]
    return (place >= begin) & (place < end)


def grouped(pieces: list[Piece], windows: TextWindows, names: list[str]) -> dict[tuple[int, str], list[Piece]]:
    """The pieces that can be scored together: by width and by the name of what scores them, in order."""
    groups: dict[tuple[int, str], list[Piece]] = defaultdict(list)
    for piece, name in zip(pieces, names, strict=True):
        groups[windows.width(len(piece.tokens)), name].append(piece)
    return dict(sorted(groups.items()))
