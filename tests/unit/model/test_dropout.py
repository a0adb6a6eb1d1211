"""Dropout by quarters of random words: its rate, its scale, its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_ds.model.dropout import dropout

LEVELS = 65536


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_and_scale(rate: float) -> None:
    """Each of the four quarters of a word keeps its share, to 5 standard errors, and the scale undoes it exactly."""
    torch.manual_seed(0)
    dropped = round(rate * LEVELS)
    kept = dropout(torch.ones(250_000, 4), rate, training=True)
    expected = 1 - dropped / LEVELS
    for share, count in (
        ((kept != 0).double().mean(), 1_000_000),
        *((each, 250_000) for each in (kept != 0).double().mean(0)),
    ):
        assert abs(float(share) - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(LEVELS / (LEVELS - dropped)))}


def test_neighbours_are_independent() -> None:
    """The quarters of one word, and words one after the other, share nothing."""
    torch.manual_seed(1)
    kept = (dropout(torch.ones(1_000_000), 0.5, training=True) != 0).double() - 0.5
    for apart in range(1, 9):
        assert abs(float((kept[apart:] * kept[:-apart]).mean())) < 5 * 0.25 / 1000


def test_the_seed_decides() -> None:
    x = torch.randn(33, 7)
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append([dropout(x, 0.3, training=True) for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0]) and torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[2][0]) and not torch.equal(masks[0][0], masks[0][1])


@pytest.mark.parametrize(("rate", "training"), [(0.3, False), (0.0, True)])
def test_nothing_is_dropped(rate: float, training: bool) -> None:
    x = torch.randn(5, 3)
    assert torch.equal(dropout(x, rate, training), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7, 3), (64, 64)])
def test_gradient_is_the_scaled_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = (torch.rand(shape) + 1).to(dtype).requires_grad_()
    above = torch.randn(shape).to(dtype)
    output = dropout(x, 0.4, training=True)
    assert output.shape == shape and output.dtype == dtype
    (gradient,) = torch.autograd.grad(output, x, above)
    scale = torch.tensor(LEVELS / (LEVELS - round(0.4 * LEVELS)), dtype=dtype)
    assert torch.equal(gradient, torch.where(output != 0, above * scale, torch.zeros_like(above)))
    assert torch.equal(output, torch.where(output != 0, x * scale, torch.zeros_like(x)))
