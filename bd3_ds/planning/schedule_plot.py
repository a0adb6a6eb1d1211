"""The picture of `run.py check --plot`: what a run's noise schedule and weight do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.diffusion.proposal import Proposal, make_proposal
from bd3_ds.diffusion.weighting import loss_weight
from bd3_ds.runtime.files import apply_umask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_schedule(run: RunConfig, path: Path) -> None:
    """Density, weight and masked share as a PNG at `path`; a schedule that moves is drawn at its start and its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule_figure(run).savefig(path, format="png", dpi=110)
    apply_umask(path)


def schedule_figure(run: RunConfig) -> Figure:
    """The three panels. Probabilities and densities begin at 0, so that a flat one looks flat."""
    from matplotlib.figure import Figure

    stages = {"start": 0.0, "end": 1.0} if _moves(run) else {"": 0.0}
    figure = Figure(figsize=(13, 4), layout="constrained")
    density, weight, share_of = figure.subplots(1, 3)
    for number, (name, progress) in enumerate(stages.items()):
        proposal = make_proposal(run.objective.schedule, progress)
        color, label = f"C{number}", name or run.objective.schedule.name
        p, q, bound, loss = curves(run, proposal)
        marker = {} if proposal.schedule is not None else {"marker": "o"}  # one rate: a point, no line
        if proposal.schedule is None:
            density.axvline(proposal.lowest, color=color, label=f"{label}: p = {proposal.lowest:g} alone")
        else:
            density.plot(p, q, color=color, label=label)
        weight.plot(p, loss, color=color, label=f"{label}: loss ({run.objective.weight.name})", **marker)
        weight.plot(
            p, bound, linestyle=":", color="black" if len(stages) == 1 else color, label=f"{label}: bound", **marker
        )
        count, chance = masked_counts(proposal, block_size(run))
        share_of.step(count / block_size(run), chance, where="mid", color=color, label=label)
        mean = float((count * chance).sum()) / block_size(run)
        share_of.axvline(mean, color=color, linestyle=":", label=f"mean {mean:.3f}")
    density.set(title="density q(p) of the masking rate", xlabel="masking rate p", ylim=_from_zero(density))
    weight.set(title="weight of a masked token", xlabel="masking rate p", yscale="log", ylim=_a_decade(weight))
    share_of.set(title=f"masked share of a block of {block_size(run)}", xlabel="masked share", ylabel="probability")
    share_of.set_ylim(*_from_zero(share_of))
    for axes in (density, weight, share_of):
        axes.set_xlim(-0.02, 1.02)  # the ends are seen: a rate of 0 or 1 may be all there is
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _from_zero(axes: Axes) -> tuple[float, float]:
    """From 0 to a tenth above the largest value drawn."""
    top = axes.dataLim.ymax
    return 0.0, 1.1 * top if 0 < top < math.inf else 1.0


def _a_decade(axes: Axes) -> tuple[float, float]:
    """All values drawn, and at least one decade: a constant weight is a line in the middle."""
    low, high = axes.dataLim.ymin, axes.dataLim.ymax
    middle = (low * high) ** 0.5
    return min(low / 1.3, middle / 10**0.5), max(high * 1.3, middle * 10**0.5)


def _moves(run: RunConfig) -> bool:
    """Whether training draws other rates at its end than at its start."""
    times = torch.linspace(0, 1, 65, dtype=torch.float64)
    start, end = (make_proposal(run.objective.schedule, progress).rate(times) for progress in (0.0, 1.0))
    return not torch.equal(start, end)


def curves(run: RunConfig, proposal: Proposal) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rates p that can be drawn, their density, their weight in the bound and in the loss; each [N] fp64."""
    between = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    p = proposal.lowest + (proposal.highest - proposal.lowest) * between
    bound = proposal.weight(p)
    density = torch.ones_like(p) if proposal.schedule is None else proposal.schedule.density(p)
    return p, density, bound, loss_weight(run.objective.weight, p, bound)


def masked_counts(proposal: Proposal, tokens: int) -> tuple[Tensor, Tensor]:
    """Number of masked tokens of a block, 0 … tokens, and the probability of each under the proposal; fp64."""
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    p = proposal.rate(u).clamp(1e-12, 1 - 1e-12)
    count = torch.arange(tokens + 1, dtype=torch.float64)
    choose = torch.lgamma(count.max() + 1) - torch.lgamma(count + 1) - torch.lgamma(tokens - count + 1)
    log_chance = choose + count * p[:, None].log() + (tokens - count) * (-p[:, None]).log1p()  # [N, tokens + 1]
    return count, log_chance.exp().mean(0)
