"""All ZeRO stages train the same model; eight steps of the benchmark's ten runs."""

import pytest

from benchmarks.zero_matrix import PRECISIONS, distance, measure, table

# bf16 keeps 8 bits, a relative step of 0.4%; stages differ in where they round, and the mean over 8 x 63 tokens
# averages most of that away. Losses here are 4 to 5 nats.
BF16 = 0.01


@pytest.mark.slow
def test_stages_agree(tmp_path):
    results = measure(tmp_path, None, steps=8, seed=3)
    by = {(r["precision"], r["ranks"], r["stage"]): r["loss"] for r in results}
    assert len(by) == 10 and all(len(loss) == 8 for loss in by.values())
    for stage in range(4):
        assert distance(by["fp32", 2, stage], by["fp32", 1, 0]) < 1e-4
        assert distance(by["bf16", 2, stage], by["fp32", 1, 0]) < 2 * BF16
    for stage in (2, 3):
        assert distance(by["bf16", 2, stage], by["bf16", 2, 1]) < BF16
    assert table(results).count("\n") == 1 + len(PRECISIONS) * 5
