"""What the plan's table says of the run itself: ranks, model, batch, noise schedule; and what to be warned of."""

from __future__ import annotations

from typing import Any

from bd3_ds.config.check import ranks_at_work
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AUTO, RunConfig, block_size, block_sizes
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.planning.findings import Findings, micro_batch_sentence
from bd3_ds.planning.table import Rows


def run_rows(run: RunConfig, made: dict[str, Any], found: Findings, assumed: str) -> Rows:
    """Ranks, model and batch; `assumed` says what of the ranks was not given."""
    size, batch, tokens = block_size(run), made["batch"], made["speed"]["tokens"]
    blocks = run.data.length // size
    model = (
        f"{made['parameters']:,} parameters; objective {run.objective.name}, block size {size}: {blocks:,} "
        f"block{'s' if blocks > 1 else ''} in {run.data.length:,} tokens"
    )
    later = [
        f"from step {step:,} on: block size {' or '.join(map(str, sizes))}"
        for step, sizes in sorted(run.objective.block_schedule.items())
    ]
    epochs = ""
    if found.chunks is not None:
        own = 1 - sum(run.data.mix.values())
        epochs = f", {run.train.total_steps * run.train.global_batch * own / found.chunks:.3g} epochs of data.train"
    auto = " (auto)" if found.asked_micro_batch == AUTO else ""
    ranks = f"{made['ranks']} x {made['machine']['name']}, {made['ranks'] // made['nodes']} to a node"
    return [
        ("ranks", ranks + (f" ({assumed})" if assumed else "")),
        ("model", "; ".join([model, *later])),
        (
            "batch",
            f"global batch {batch['global']} = {batch['micro']}{auto} x {batch['accumulation']} micro-batches x "
            f"{ranks_at_work(run, made['ranks'])} = {batch['tokens']:,} tokens; largest micro-batch that fits: "
            f"{made['largest_micro_batch'] or 'none'}",
        ),
        ("steps", f"{run.train.total_steps:,} = {tokens:,} tokens{epochs}"),
    ]


def warnings(found: Findings, made: dict[str, Any], run: RunConfig, here: bool) -> list[str]:
    """What training would refuse, and what was assumed."""
    said = []
    if found.missing:
        assumed = f"; vocabulary taken as {found.vocabulary}" if found.vocabulary else ""
        said.append(f"data not there yet: {', '.join(dict.fromkeys(found.missing))}{assumed}; shards unchecked")
    if found.asked_micro_batch not in (None, AUTO):
        said.append(micro_batch_sentence(found, run.train.micro_batch, made["ranks"]))
    said += found.refused
    disk = made["disk"]
    if disk["free"] is not None and disk["run_dir"] > disk["free"]:
        said.append(
            "run_dir lacks the disk that the run needs: keep fewer checkpoints (train.keep_checkpoints), export less "
            "often (train.export_every), or choose another run_dir"
        )
    if here and not made["machine"]["cuda"] and made["bound"]["days"] > 2:
        said.append("planned for this machine, which has no GPU; plan for others with --gpu h100-80g --world-size 8")
    return said


def masking(run: RunConfig) -> tuple[Rows, list[str]]:
    """What training masks, in a row; warnings where its noise schedule serves training or sampling badly."""
    if OBJECTIVES[run.objective.name].causal:
        return [], []
    proposal = make_proposal(run.objective.schedule)
    effective = proposal.effective_share
    lines = [
        f"{run.objective.schedule.name}, masking rates {proposal.lowest:.3g} to {proposal.highest:.3g}; effective "
        f"sample size by the blocks' weights {effective:.1%}"
    ]
    warnings = []
    if effective < 0.1:
        warnings.append("a few blocks carry nearly all of the weight; objective.schedule.defensive=0.1 would spread it")
    for size in sorted({size for step in {0, *run.objective.block_schedule} for size in block_sizes(run, step)}):
        mean, covered, usual = proposal.mean_rate, proposal.all_masked_share(size), 1 / (size + 1)
        lines.append(
            f"block size {size}: {mean:.1%} of tokens are masked on average, {covered:.3g} of blocks wholly (unclipped "
            f"log-linear time: {usual:.3g})"
        )
        if covered < 0.01 * usual:
            warnings.append(
                "sampling starts from blocks of masks alone, which training hardly shows at block size "
                f"{size}; raise objective.schedule.t_max or objective.schedule.defensive"
            )
    return [("schedule" if number == 0 else "", line) for number, line in enumerate(lines)], warnings
