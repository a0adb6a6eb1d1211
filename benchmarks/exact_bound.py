"""The exact bound on a real set: its time against as many plain evaluations, and against mc at the same standard error.

    python -m benchmarks.exact_bound EXPORT PACK [--sequences 64] [--at-once 60]

An evaluation is plain when each noisy view goes through the network with its own clean tokens, logits of all noisy
positions are made, and the views come one after another: 2^L' - 1 of them give the exact value. Ours makes one clean
pass for all views and logits at masked tokens alone. mc is the paper's protocol, with as many noisy sequences a pass;
its standard error falls with the root of its views, so that its variance tells how many views a text it needs for
`target`, the standard error of the whole as a share of the bound. `seconds` of mc are those of MC_VIEWS views.
"""

from __future__ import annotations

import sys
from math import comb
from pathlib import Path

import torch

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.schema import block_size
from bd3_ds.data.pack import open_pack
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.likelihood import Texts
from bd3_ds.diffusion.subs import subs_nll
from bd3_ds.evaluation.denoisers import conditioned
from bd3_ds.evaluation.network import load_model
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.allocator import keep_freed_memory
from benchmarks import measure

MC_VIEWS = 30


def main(argv: list[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("export", type=Path, help="a BD3 export, or a run")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=60, help="noisy sequences of a pass")
    parser.add_argument("--target", type=float, default=0.005, help="standard error over the bound, for mc")
    options = parser.parse_args(argv)
    keep_freed_memory()
    export = find_export(str(options.export))
    model, size = load_model(export, torch.device("cpu")), block_size(export.run)
    mask_id = export.run.model.mask_id
    assert mask_id is not None
    x0 = torch.from_numpy(open_pack(options.pack).all_tokens(options.sequences))
    views = 2**size - 1
    texts = max(1, options.at_once // views)

    condition = conditioned(model, size)

    def exact() -> float:
        return sum(
            likelihood.exact(condition, Texts(part), size, mask_id, views * texts).total for part in x0.split(texts)
        )

    def mc() -> tuple[float, float]:
        """Value, and variance of one view, of all texts."""
        parts = list(enumerate(x0.split(max(1, options.at_once // MC_VIEWS))))
        first = len(parts[0][1])
        bounds = [
            likelihood.monte_carlo(condition, Texts(part, first_row=number * first), size, mask_id, MC_VIEWS, seed=0)
            for number, part in parts
        ]
        return sum(b.total for b in bounds), MC_VIEWS * sum(float(b.variance.sum()) for b in bounds)

    with torch.no_grad():
        nelbo, (mc_nelbo, variance) = exact(), mc()
        one_by_one = plain(model, x0, size, mask_id)
        ways = {"exact": exact, "plain": lambda: plain(model, x0, size, mask_id), "mc": mc}
        seconds = measure.interleaved(ways, options.repeats)
    times = {name: measure.summary(found) for name, found in seconds.items()}
    needed = variance / (options.target * nelbo) ** 2
    mc_seconds = needed * times["mc"]["median"] / MC_VIEWS
    results = {
        "views": views,
        "nelbo": {"exact": nelbo, "plain": one_by_one, "mc": mc_nelbo},
        "seconds": times,
        "speedup_to_plain": times["plain"]["median"] / times["exact"]["median"],
        "mc_views_needed": needed,
        "mc_seconds_needed": mc_seconds,
        "speedup_to_mc": mc_seconds / times["exact"]["median"],
    }
    measure.finish("exact_bound", options, results, options.json)
    return 0


def plain(model: DiT, x0: torch.Tensor, size: int, mask_id: int) -> float:
    """The exact NELBO of all texts in nats, one view a pass, with whole logits."""
    total, length = 0.0, x0.shape[1]
    first_block = torch.arange(length) < size
    for subset in range(1, 2**size):
        pattern = torch.tensor([bool(subset >> place & 1) for place in range(size)]).repeat(length // size)
        pattern[0] = False
        count = subset.bit_count()
        weight = torch.full((length,), 1 / (count * comb(size, count)), dtype=torch.float64)
        # Position 0 is given: the first block has one maskable token less, and subsets that hold it are not its own.
        weight[first_block] = 0.0 if subset & 1 else 1 / (count * max(1, comb(size - 1, count)))
        for rows in x0.split(16):
            logits = model(torch.where(pattern, mask_id, rows), rows, block_size=size)
            nats = subs_nll(logits.flatten(0, 1), rows.flatten(), mask_id).view(rows.shape).double()
            total += float((nats * pattern * weight).sum())
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
