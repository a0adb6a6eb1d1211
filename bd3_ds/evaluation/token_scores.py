"""Scoring token ids: what `LanguageModel.score` computes once its arguments are tensors."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bd3_ds.config.check import EXACT_ALWAYS, estimator_used
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.diffusion.likelihood import Estimator, Texts
from bd3_ds.evaluation.arguments import check_seed, positions_to_score
from bd3_ds.evaluation.perplexity import bound_of
from bd3_ds.evaluation.score import Score
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from bd3_ds.evaluation.api import LanguageModel

TOKENS_AT_ONCE = 2**16  # noisy tokens that one pass may take in,
VIEWS_AT_ONCE = 256  # and noisy sequences


def score_tokens(
    model: LanguageModel, x0: Tensor, scored: Any, estimator: str | None, views: int, seed: int, first_row: int = 0
) -> Score:
    """The bound of ids x0 [B, L] on the model's device; arguments and errors as for `LanguageModel.score`."""
    length = x0.shape[1]
    run = _run_at(model.run, length)
    size = block_size(run)
    positions = positions_to_score(scored, x0, model.mask_id, size)
    if views < 1:
        raise UserError(f"views={views} must be at least 1")
    check_seed(seed)
    missing = -length % size
    texts = Texts(
        pad(x0, (0, missing), value=model.mask_id),
        scored=pad(positions, (0, missing), value=False),
        first_row=first_row,
    )
    assert texts.scored is not None
    together = int(texts.scored.view(len(texts), -1, size).sum(-1).max())
    asked = estimator or _default_estimator(run.objective.name, together)
    used = estimator_used(run, asked, "estimator", int(positions.sum()), together)
    if used == "report":
        raise UserError("estimator=report is no bound; `run.py evaluate --estimator report` prints it beside one")
    at_once = max(1, min(VIEWS_AT_ONCE, TOKENS_AT_ONCE // texts.x0.shape[1]))
    rows = max(1, at_once // (1 if used == "exact" else views))
    how = Estimator(used, views, seed, at_once)
    bounds = [bound_of(model.network, run, texts.rows(first, rows), how) for first in range(0, len(texts), rows)]
    stderr = torch.cat([bound.stderr.double() for bound in bounds])
    return Score(
        torch.cat([bound.nelbo.double() for bound in bounds])[:, :length],
        stderr if used == "exact" or views > 1 else torch.full_like(stderr, torch.nan),
        sum(bound.forwards for bound in bounds),
        sum(bound.tokens for bound in bounds),
        positions.sum(1),
        used,
    )


def _default_estimator(objective: str, together: int) -> str:
    """What scores blocks of so many tokens where nothing is asked for."""
    known = OBJECTIVES[objective]
    exact = known.can_be_exact and (known.causal or together <= EXACT_ALWAYS)
    return "exact" if exact else known.sampled_estimator


def _run_at(run: RunConfig, length: int) -> RunConfig:
    """The run as if its sequences were `length` long: MDLM and SEDD take a shorter text as one shorter block."""
    if not OBJECTIVES[run.objective.name].is_whole:
        return run
    return dataclasses.replace(run, data=dataclasses.replace(run.data, length=length))
