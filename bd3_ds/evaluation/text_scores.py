"""Scoring texts of any length: encoded after BOS, in windows of the context length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bd3_ds.evaluation.score import Score
from bd3_ds.evaluation.text_windows import TextWindows, filled, grouped, places
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from bd3_ds.evaluation.api import LanguageModel

ROWS_AT_ONCE = 256  # texts that are given to `score` together; it divides them by memory


def score_texts(
    model: LanguageModel, texts: Sequence[str], estimator: str | None = None, views: int = 8, seed: int = 0
) -> Score:
    """The bound of each text: row b, column i is token i of text b, BOS (given, not scored) at 0, nothing after it.

    No EOS is added. A text longer than the model's L is read in windows, each token scored once (`text_windows.py`).
    estimator None: exact where no block has more than 8 tokens to score, else stratified; AR exact, SEDD mc. Raises
    UserError for an empty list, a text without a token, and estimators that do not go with the model.
    """
    tokenizer = model.require_tokenizer("; or give token ids [[id, …], …]")
    if not texts:
        raise UserError("the list of texts is empty; give one text or more")
    encoded = tokenizer.encode_batch(list(texts))
    for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if not ids:
            raise UserError(f"text {number} ({text[:40]!r}) has no token to score; leave empty texts out")
        if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
            count = ids.count(tokenizer.unk_id)
            warnings.warn(
                f"text {number} ({text[:40]!r}) has what the tokenizer cannot write; it is scored as {count} unknown "
                "token(s)",
                stacklevel=3,
            )
    windows = TextWindows(model.run.data.length, model.block_size)
    pieces = [
        piece
        for number, ids in enumerate(encoded)
        for piece in windows.pieces([tokenizer.bos_id, *ids], 1, number)
    ]  # fmt: skip
    objective = model.run.objective.name
    names = [estimator or windows.estimator(piece, objective) for piece in pieces]
    nelbo = torch.zeros(len(texts), 1 + max(map(len, encoded)), dtype=torch.float64, device=model.device)
    variance = torch.zeros(len(texts), dtype=torch.float64, device=model.device)
    used, forwards, number = set(), 0, 0  # number: of the next piece; each has its own random numbers
    for (width, name), group in grouped(pieces, windows, names).items():
        for first in range(0, len(group), ROWS_AT_ONCE):
            part = group[first : first + ROWS_AT_ONCE]
            rows = filled([piece.tokens for piece in part], model.mask_id, width)
            score = model.score(rows, name, views, seed, places(part, width), first_row=number)
            number += len(part)
            forwards += score.forwards
            used.add(score.estimator)
            for row, piece in enumerate(part):
                span = slice(piece.given, len(piece.tokens))
                nelbo[piece.text, piece.start + span.start : piece.start + span.stop] = score.nelbo[row, span]
                variance[piece.text] += score.stderr[row] ** 2
    by_row = torch.tensor([len(ids) for ids in encoded], device=model.device)
    return Score(nelbo, variance.sqrt(), forwards, int(by_row.sum()), by_row, ", ".join(sorted(used)))
