"""The perplexity of an export on a frozen set: the one bound (docs/objective.md), with its standard error."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_ds.checkpoint.export import Export
from bd3_ds.config.check import estimator_used
from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.data.pack import open_pack
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.bounds import bound_under
from bd3_ds.diffusion.likelihood import Bound, Estimator, Texts
from bd3_ds.diffusion.report_estimator import report_rates
from bd3_ds.evaluation.denoisers import conditioned, scored_network
from bd3_ds.evaluation.packs import check_pack
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.errors import UserError

# Called with (sequences done, sequences in all) after every batch.
SequencesDone = Callable[[int, int], None]


def evaluate_pack(
    model: DiT,
    export: Export,
    pack_dir: str | Path,
    set_name: str,
    estimator: Estimator,
    max_chunks: int | None = None,
    progress: SequencesDone | None = None,
) -> dict[str, Any]:
    """The record of one (export, set); `nelbo` and `stderr` in nats per scored token, `ppl` = exp(nelbo).

    `stderr` is what the estimator itself adds, for this text: 0 where the value is exact; `ppl_stderr` = ppl x stderr
    is that of the perplexity. The first `chunks` of the set's `chunks_in_set` are scored, on the model's device;
    `estimator.at_once` bounds the noisy sequences of a forward pass; weights and arithmetic are fp32. Raises UserError
    for a set that the export cannot read or that has nothing to score, an estimator that does not fit, and a bound that
    is not finite. `report` adds `report_loss` (nats per scored token) and `report_ppl` = its exp, which the project's
    report printed, to the stratified bound.
    """
    manifest = check_pack(export, set_name, str(pack_dir))
    texts = read_texts(pack_dir, max_chunks, apart=export.run.data.document_mask)
    scored = int(texts.scored_positions().sum())
    if scored == 0:
        raise UserError(
            f"set {set_name} in {pack_dir} has nothing to score: all but the given first tokens is padding; prepare it "
            "from longer documents"
        )
    used = dataclasses.replace(estimator, name=estimator_used(export.run, estimator.name, "estimator", scored))
    if used.name != "exact" and used.views == 1 and len(texts) == 1:
        raise UserError(
            f"set {set_name}: one view of one sequence tells nothing of its own error; give --views 2 (eval.views) or "
            "more sequences"
        )
    start = time.perf_counter()
    sums = _score(model, export, texts, used, set_name, progress)
    nelbo = float(sums.nats.sum()) / scored
    if not math.isfinite(nelbo):
        raise UserError(f"the NELBO of set {set_name} under {export.path} is {nelbo}; choose an earlier export")
    stderr = float(sums.variance(used).sqrt()) / scored
    return {
        "export": export.name,
        "step": export.step,
        "set": set_name,
        "estimator": used.name,
        "nelbo": nelbo,
        "stderr": stderr,
        "ppl": _exp(nelbo),
        "ppl_stderr": _exp(nelbo) * stderr,
        "tokens": scored,
        "pack_hash": manifest.pack_hash,
        "content_hash": manifest.content_hash,
        "forwards": sums.forwards,
        "seconds": time.perf_counter() - start,
        "views": used.views if used.name != "exact" else None,
        "chunks": len(texts),
        "chunks_in_set": manifest.chunks,
        **_reported(sums.report / scored, used),
    }


def read_texts(pack_dir: str | Path, max_chunks: int | None = None, *, apart: bool) -> Texts:
    """The pack's first chunks, on the CPU; `apart`: each token's document, even without padding."""
    pack = open_pack(pack_dir)
    documents = pack.all_documents(max_chunks, apart=apart)
    tokens = torch.from_numpy(pack.all_tokens(max_chunks))
    return Texts(tokens, None if documents is None else torch.from_numpy(documents))


@dataclass(frozen=True)
class _Sums:
    """Of a set. nats: [N] the bound of each sequence, fp64. own_variance: [N] what the estimator says of its error.

    report: the summed loss of `report_loss`, 0 where it was not asked for.
    """

    nats: Tensor
    own_variance: Tensor
    forwards: int
    report: float

    def variance(self, estimator: Estimator) -> Tensor:
        """The variance of the summed bound that the estimator adds."""
        if estimator.name != "exact" and estimator.views == 1 and len(self.nats) > 1:
            # One view knows nothing of its own error; the spread over sequences, text included, is an upper estimate.
            return len(self.nats) * self.nats.var()
        return self.own_variance.sum()


def _score(
    model: DiT, export: Export, texts: Texts, estimator: Estimator, set_name: str, progress: SequencesDone | None
) -> _Sums:
    """The sums over all texts, as many clean sequences a pass as hold `estimator.at_once` noisy ones."""
    device = next(model.parameters()).device
    views = 2 ** block_size(export.run) - 1 if estimator.name == "exact" else estimator.views
    together = max(1, estimator.at_once // views)
    bounds, report = [], 0.0
    for first in range(0, len(texts), together):
        batch = texts.rows(first, together).to(device)
        try:
            bounds.append(bound_of(model, export.run, batch, estimator))
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"set {set_name}: {max(estimator.at_once, estimator.views)} noisy sequences do not fit into the memory "
                f"of {device}; lower --batch (eval.batch) or --views (eval.views)"
            ) from None
        if estimator.name == "report":
            report += report_loss(model, export, batch, estimator)
        if progress is not None:
            progress(min(first + together, len(texts)), len(texts))
    return _Sums(
        torch.cat([bound.nelbo.double().sum(1).cpu() for bound in bounds]),
        torch.cat([bound.variance.double().cpu() for bound in bounds]),
        sum(bound.forwards for bound in bounds),
        report,
    )


@torch.no_grad()
def bound_of(model: DiT, run: RunConfig, texts: Texts, estimator: Estimator) -> Bound:
    """The Bound of texts under the run's objective, by an estimator whose name `estimator_used` returned.

    Sampled estimators draw by (seed, number of the row), so batching does not matter. With `texts.documents`, tokens
    see their own document only.
    """
    assert run.model.mask_id is not None
    size = block_size(run)
    network = scored_network(model, size, texts.documents)
    return bound_under(run.objective.name, network, texts, size, run.model.mask_id, estimator)


@torch.no_grad()
def report_loss(model: DiT, export: Export, texts: Texts, estimator: Estimator) -> float:
    """The summed validation loss of texts as the project's report took it, in nats; not a bound."""
    run, size = export.run, block_size(export.run)
    assert run.model.mask_id is not None
    draw = partial(report_rates, objective=run.objective, progress=export.step / run.train.total_steps)
    condition = conditioned(model, size, texts.documents)
    return likelihood.monte_carlo(
        condition, texts, size, run.model.mask_id, estimator.views, estimator.seed, draw
    ).total


def _reported(loss: float, estimator: Estimator) -> dict[str, float]:
    return {"report_loss": loss, "report_ppl": _exp(loss)} if estimator.name == "report" else {}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # e^709 is the last fp64 number
