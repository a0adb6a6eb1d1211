"""Bytes that real steps on two ranks hand to torch's collectives, against the formulas that docs/scaling.md uses."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from bd3_ds.planning.communication import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, zero_traffic
from benchmarks.counted import Case, measure_ranks
from benchmarks.ours import Configuration

# How torch's dispatcher calls them.
NAMES = {"allreduce": ALL_REDUCE, "allgather_base": ALL_GATHER, "reduce_scatter_base": REDUCE_SCATTER}
OUR_SUMS = 4096  # bytes of losses, moments, norms and flags, summed over ranks in every step
# Nothing stays gathered for being small, and nothing is fetched long before its use.
STRICT = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "accumulation", "settings"),
    [
        (0, 2, {}),
        (1, 2, {}),
        (2, 2, {"overlap_comm": True}),
        (3, 1, {**STRICT, "stage3_max_reuse_distance": 0}),
        (3, 2, STRICT),
    ],
)
def test_counted_bytes_are_the_formulas(stage: int, accumulation: int, settings: dict[str, Any]) -> None:
    configuration = Configuration("tiny", 512, 64, 16, 2)
    words = ("model.hidden_size=64", "model.layers=2", "model.heads=4")
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, **settings}
    found = measure_ranks(Case(configuration, "bd3", "bf16", 2, zero, words, accumulation))
    counted: dict[str, int] = defaultdict(int)
    for name, of in found["collectives"].items():
        counted[NAMES.get(name, name)] += of["bytes"]
    expected: dict[str, float] = defaultdict(float)
    distance = settings.get("stage3_max_reuse_distance", 10**9)
    for one in zero_traffic(found["parameters"], str(stage), 2, 8, accumulation, distance=distance):
        expected[one.kind] += one.tensor
    # DeepSpeed pads a group of weights to a multiple of the ranks; there are two groups.
    for kind in {*counted, *expected}:
        assert expected[kind] <= counted[kind] <= expected[kind] + OUR_SUMS, (kind, counted, expected)
    assert max(expected.values()) > 100 * OUR_SUMS
