"""Orders of unmasking side by side: what each costs, and what a judge thinks of the texts.

    python -m benchmarks.orders EXPORT --judge PLACE [--num 64 --length L --nucleus P] [--json FILE]

Texts are written to the full length (no EOS ends them), all with the same seed. `gen_ppl` is that of docs/quality.md,
`entropy` the mean entropy of a text's own tokens: a low perplexity with a low entropy is repetition. tokens/s is of one
run each, after one short run that does not count. `evaluations` leave out the passes that only write the cache,
`forwards` have them.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.evaluation.api import LanguageModel
from bd3_ds.evaluation.text.gen_ppl import open_judge
from bd3_ds.evaluation.text.quality import Quality
from bd3_ds.sampling.stopping import unigram_entropy
from benchmarks.measure import finish, parser, say

ORDERS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.9},
    {"threshold": 0.7},
    {"threshold": 0.5},
    {"entropy_bound": 0.1},
    {"entropy_bound": 0.5},
    {"tokens_per_step": 1},
    {"tokens_per_step": 2},
    {"tokens_per_step": 4},
]


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("export", help="of a diffusion model")
    options.add_argument("--judge", required=True)
    options.add_argument("--num", type=int, default=64, help="texts of each order")
    options.add_argument("--length", type=int, help="tokens of a text; default: the model's L")
    options.add_argument("--nucleus", type=float)
    options.add_argument("--precision", default="fp32")
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LanguageModel(find_export(asked.export), device, asked.precision)
    quality = Quality(open_judge(asked.judge, device))
    length = asked.length or model.run.data.length
    size = min(model.block_size, length)
    orders = [*ORDERS, *({"steps": max(1, size // part)} for part in (1, 2, 4))]
    if OBJECTIVES[model.run.objective.name].timed:
        orders += [{"steps": size, "analytic": True}, {"steps": max(1, size // 4), "analytic": True}]
    model.sample(2, min(length, 2 * size))
    results = []
    for order in orders:
        start = time.perf_counter()
        samples = model.sample(asked.num, length, seed=asked.seed, nucleus=asked.nucleus, **order)
        seconds = time.perf_counter() - start
        written = int((samples.order > 0).sum())
        evaluations, writes = int(samples.nfe.sum()), int(samples.cache_forwards.sum())
        judged = quality.read(model.decode(samples)).figures
        results.append(
            {
                "order": order or "first hitting",
                "tokens_per_s": written / seconds,
                "evaluations_a_text": evaluations / asked.num,
                "forwards_a_text": (evaluations + writes) / asked.num,
                "tokens_an_evaluation": written / evaluations,
                "gen_ppl": judged["ppl"],
                "gen_ppl_stderr": judged["ppl_stderr"],
                "entropy": float(unigram_entropy(samples.tokens).mean()),
                "distinct": judged["distinct"],
            }
        )
        say(f"{order}: {results[-1]}")
    finish("orders", asked, results, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
