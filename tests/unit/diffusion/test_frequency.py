"""Masking by frequency: rates keep their block's mean and their order, and power 0 is plain masking."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_ds.config.schema import BD3, FrequencyConfig, WeightConfig
from bd3_ds.data.pack import open_pack
from bd3_ds.data.token_counts import COUNTS, read_token_counts
from bd3_ds.diffusion.frequency import power_at, rarity, token_rates
from bd3_ds.diffusion.noise import make_noise, mask_draws, scored_positions, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.runtime.errors import UserError, run_command
from data_prep import verify
from tests.helpers.schedules import schedule_config
from tests.helpers.tiny import tiny_pack

counts = st.lists(st.integers(0, 50), min_size=1, max_size=30).map(np.array)


@given(counts)
@settings(deadline=None)
def test_rarity_orders_tokens(number: np.ndarray) -> None:
    rare = rarity(number).numpy()
    assert rare.min() > 0 and rare.max() <= 1
    for i, j in ((i, j) for i in range(len(number)) for j in range(len(number))):
        assert (number[i] < number[j]) == (rare[i] > rare[j])
    assert rare.mean() == pytest.approx((len(number) + 1) / 2 / len(number))


@given(counts, st.floats(0, 1), st.floats(0, 1), st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_rates_of_a_block(number: np.ndarray, power: float, rate: float, size: int, seed: int) -> None:
    """In [0, 1], in the order of rarity, and their mean is the block's rate."""
    tokens = torch.randint(0, len(number), (2, 3, size), generator=torch.Generator().manual_seed(seed))
    masking_score = rarity(number)[tokens] ** power
    block = torch.full((2, 3), rate, dtype=torch.float64)
    rates = token_rates(masking_score, block, scored_positions(tokens.flatten(1)).view(tokens.shape))
    counted = rates.flatten(1)[:, 1:]
    assert bool((counted >= -1e-12).all()) and bool((counted <= 1 + 1e-12).all())
    torch.testing.assert_close(rates[:, 1:].mean(-1), block[:, 1:], rtol=1e-9, atol=1e-12)
    if size > 1:  # the first block's first token is given
        torch.testing.assert_close(rates[:, 0, 1:].mean(-1), block[:, 0], rtol=1e-9, atol=1e-12)
    ordered = torch.gather(rates, -1, masking_score.argsort(-1))
    assert bool((ordered.diff() >= -1e-9).all())
    if power == 0:
        torch.testing.assert_close(rates[:, 1:], block[:, 1:, None].expand_as(rates[:, 1:]))


def test_curriculum_grows_to_the_power() -> None:
    config = FrequencyConfig(power=0.4, curriculum_steps=100)
    assert [power_at(config, step) for step in (0, 50, 100, 1000)] == pytest.approx([0, 0.2, 0.4, 0.4])
    assert power_at(FrequencyConfig(0.4, 0), 0) == 0.4


def test_rare_tokens_are_masked_more_often_at_the_same_mean() -> None:
    """Token 0 is everywhere, token 1 rare: masks follow, the share of masked tokens stays, ln V is still ln V."""
    batch, length, vocab = 4096, 16, 5
    x0 = (torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.2).long()
    score = rarity(np.array([800, 200, 0, 0, 0]))[x0] ** 0.8
    slots = np.arange(batch)
    u, draws = stratified_times(1, 0, slots, batch, 4), mask_draws(1, 0, slots, length)
    plain, informed = (
        make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0), w) for w in (None, score)
    )
    seen = []

    def uniform(x_t, clean, *, sigma, at, read):
        seen.append(x_t == vocab - 1)
        assert torch.equal(at, seen[-1].flatten().nonzero()[:, 0])
        return read.of_logits(torch.zeros(len(at), vocab))

    losses = [training_loss(BD3, uniform, x0, noise, vocab - 1) for noise in (plain, informed)]
    by_token = [[float(at[:, 1:][x0[:, 1:] == token].double().mean()) for token in (0, 1)] for at in seen]
    assert by_token[0][0] == pytest.approx(by_token[0][1], abs=0.02)
    assert by_token[1][1] > by_token[1][0] + 0.05
    assert float(seen[1].double().mean()) == pytest.approx(float(seen[0].double().mean()), abs=0.01)
    assert float(losses[1].nelbo) == pytest.approx(math.log(vocab - 1), rel=0.05)


def test_counts_of_a_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written with the pack, equal to its tokens, checked by verify, and asked for again where they are not there."""
    pack = open_pack(tiny_pack(tmp_path / "pack", chunks=20))
    expected = np.bincount(pack.all_tokens().ravel(), minlength=pack.manifest.tokenizer.vocab_size)
    assert (read_token_counts(pack.directory, pack.manifest) == expected).all()
    assert not run_command(verify.main, [str(tmp_path / "pack")])
    moved = expected.copy()
    moved[[0, int(expected.argmax())]] = moved[[int(expected.argmax()), 0]]
    np.save(tmp_path / "pack" / COUNTS, moved)
    assert run_command(verify.main, [str(tmp_path / "pack")]) == 2
    assert f"its {COUNTS} does not count its tokens" in capsys.readouterr().err
    for spoil in (lambda file: file.write_bytes(b""), lambda file: np.save(file, expected[:-1]), Path.unlink):
        spoil(tmp_path / "pack" / COUNTS)
        with pytest.raises(UserError, match="make the pack again"):
            read_token_counts(pack.directory, pack.manifest)
