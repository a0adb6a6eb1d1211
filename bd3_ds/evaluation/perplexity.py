"""The perplexity of an export on a frozen set: the one bound (docs/objective.md), with its standard error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_ds.checkpoint.export import Export
from bd3_ds.config.check import estimator_used
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.data.pack import open_pack
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.likelihood import Bound
from bd3_ds.diffusion.noise import scored_places
from bd3_ds.diffusion.report_estimator import report_rates
from bd3_ds.diffusion.score_entropy_bound import score_entropy_bound
from bd3_ds.evaluation.denoisers import causal, conditioned
from bd3_ds.evaluation.packs import check_pack
from bd3_ds.model.dit import DiT
from bd3_ds.model.layers import Read
from bd3_ds.runtime.errors import UserError

# Called with (sequences done, sequences in all) after every batch.
Progress = Callable[[int, int], None]


def evaluate_pack(
    model: DiT,
    export: Export,
    pack_dir: str | Path,
    set_name: str,
    *,
    estimator: str,
    views: int,
    batch: int,
    max_chunks: int | None = None,
    seed: int = 0,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The record of one (export, set); `nelbo` and `stderr` in nats per scored token, `ppl` = exp(nelbo).

    `stderr` is what the estimator itself adds, for this text: 0 where the value is exact; `ppl_stderr` = ppl x stderr
    is that of the perplexity. The first `chunks` of the set's `chunks_in_set` are scored. `batch` bounds the noisy
    sequences of a forward pass; weights and arithmetic are fp32. Raises UserError for a set that the export cannot
    read or that has nothing to score, an estimator that does not fit, and a bound that is not finite. `report` adds
    `report_loss` (nats per scored token) and `report_ppl` = its exp, which the project's report printed, to the
    stratified bound.
    """
    manifest = check_pack(export, set_name, str(pack_dir))
    pack = open_pack(pack_dir)
    tokens = torch.from_numpy(pack.all_tokens(max_chunks))
    numbers = pack.all_documents(max_chunks, apart=export.run.data.document_mask)
    documents = None if numbers is None else torch.from_numpy(numbers)
    scored = int(scored_places(tokens, documents).sum())
    if scored == 0:
        raise UserError(
            f"set {set_name} in {pack_dir} has nothing to score: all but the given first tokens is padding; prepare it "
            "from longer documents"
        )
    used = estimator_used(export.run, estimator, "estimator", scored)
    if used != "exact" and views == 1 and len(tokens) == 1:
        raise UserError(
            f"set {set_name}: one view of one sequence tells nothing of its own error; give --views 2 (eval.views) or "
            "more sequences"
        )
    size = block_size(export.run)
    together = _sequences_at_once(used, size, views, batch)
    start = time.perf_counter()
    nats, variance, forwards, reported = [], [], 0, 0.0
    for first in range(0, len(tokens), together):
        rows = slice(first, first + together)
        x0, parts = tokens[rows].to(device), None if documents is None else documents[rows].to(device)
        try:
            bound = bound_of(
                model,
                export.run,
                x0,
                used,
                views=views,
                seed=seed,
                first_sequence=first,
                at_once=batch,
                documents=parts,
            )
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"set {set_name}: {max(batch, views)} noisy sequences do not fit into the memory of {device}; "
                "lower --batch (eval.batch) or --views (eval.views)"
            ) from None
        nats.append(bound.nelbo.double().sum(1).cpu())
        variance.append(bound.variance.double().cpu())
        forwards += bound.forwards
        if used == "report":
            reported += report_loss(model, export, x0, views=views, seed=seed, first_sequence=first, documents=parts)
        if progress is not None:
            progress(min(first + together, len(tokens)), len(tokens))
    by_sequence = torch.cat(nats)
    nelbo = float(by_sequence.sum()) / scored
    if not math.isfinite(nelbo):
        raise UserError(f"the NELBO of set {set_name} under {export.path} is {nelbo}; choose an earlier export")
    total_variance = torch.cat(variance).sum()
    if used != "exact" and views == 1 and len(tokens) > 1:
        # One view knows nothing of its own error; the spread over sequences, text included, is an upper estimate.
        total_variance = len(tokens) * by_sequence.var()
    stderr = float(total_variance.sqrt()) / scored
    return {
        "export": export.name,
        "step": export.step,
        "set": set_name,
        "estimator": used,
        "nelbo": nelbo,
        "stderr": stderr,
        "ppl": _exp(nelbo),
        "ppl_stderr": _exp(nelbo) * stderr,
        "tokens": scored,
        "pack_hash": manifest.pack_hash,
        "content_hash": manifest.content_hash,
        "forwards": forwards,
        "seconds": time.perf_counter() - start,
        "views": views if used != "exact" else None,
        "chunks": len(tokens),
        "chunks_in_set": manifest.chunks,
        **({"report_loss": reported / scored, "report_ppl": _exp(reported / scored)} if used == "report" else {}),
    }


@torch.no_grad()
def bound_of(
    model: DiT,
    run: RunConfig,
    x0: Tensor,
    estimator: str,
    *,
    views: int,
    seed: int,
    first_sequence: int = 0,
    at_once: int = 64,
    documents: Tensor | None = None,
    scored: Tensor | None = None,
) -> Bound:
    """The Bound of tokens x0 [b, L] under the run's objective, by a name that `estimator_used` returned.

    Sampled estimators draw by (seed, first_sequence + row), so batching does not matter; `exact` puts `at_once` noisy
    sequences into a pass. With `documents` [b, L], each token's document, tokens see their own document alone; padding,
    where they are below 0, is not scored. `scored` [b, L] are the places to score, None for all (`likelihood.py`).
    """
    mask_id, size = run.model.mask_id, block_size(run)
    assert mask_id is not None
    if OBJECTIVES[run.objective.name].causal:
        return likelihood.autoregressive(causal(model, documents), x0, mask_id, documents, scored)
    if OBJECTIVES[run.objective.name].timed:

        def score(x_t: Tensor, sigma: Tensor, at: Tensor, read: Read) -> tuple[Tensor, Tensor]:
            answer: tuple[Tensor, Tensor] = model(
                x_t, block_size=size, sigma=sigma, at=at, read=read, documents=documents
            )
            return answer

        return score_entropy_bound(score, x0, mask_id, views, seed, first_sequence, documents, scored)
    condition = conditioned(model, size, documents)
    if estimator == "exact":
        return likelihood.exact(condition, x0, size, mask_id, at_once, documents, scored)
    sampled = likelihood.monte_carlo if estimator == "mc" else likelihood.stratified
    return sampled(condition, x0, size, mask_id, views, seed, first_sequence, documents=documents, scored=scored)


@torch.no_grad()
def report_loss(
    model: DiT,
    export: Export,
    x0: Tensor,
    *,
    views: int,
    seed: int,
    first_sequence: int = 0,
    documents: Tensor | None = None,
) -> float:
    """The summed validation loss of tokens x0 [b, L] as the project's report took it, in nats; not a bound."""
    run = export.run
    assert run.model.mask_id is not None
    size = block_size(run)
    draw = partial(report_rates, objective=run.objective, progress=export.step / run.train.total_steps)
    condition = conditioned(model, size, documents)
    mask_id = run.model.mask_id
    return likelihood.monte_carlo(condition, x0, size, mask_id, views, seed, first_sequence, draw, documents).total


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # e^709 is the last fp64 number


def _sequences_at_once(estimator: str, size: int, views: int, batch: int) -> int:
    """Clean sequences of a pass, such that `batch` noisy ones are what it holds."""
    if estimator == "exact":
        return max(1, batch // (2**size - 1))
    return max(1, batch // views)
