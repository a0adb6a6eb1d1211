"""Attention in stripes against softmax under the whole mask, and the memory that it is there to save."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.model.attention import stripe_attention, stripes
from bd3_ds.model.attention.masks import AttentionMask, pass_mask
from bd3_ds.model.attention.stripe_attention import attend_in_stripes
from tests.helpers.documents import numbers
from tests.helpers.memory import LargestTensor

CPU = torch.device("cpu")
HEADS, WIDTH = 3, 4


class Pass(NamedTuple):
    """Arguments of `pass_mask`, counts in blocks; what stripes are for has `start` = `past` beside clean tokens."""

    size: int
    noisy: int
    clean: int
    start: int
    past: int
    noisy_only: bool
    views: int

    def mask(self) -> AttentionMask:
        """Made anew, since the cache of masks knows nothing of a changed ROWS."""
        counts = [count * self.size for count in (self.noisy, self.clean, self.start, self.past)]
        return pass_mask.__wrapped__(*counts, self.size, self.noisy_only, CPU, self.views)


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    """Training passes, clean text behind a cache, and noisy blocks at, before or behind its end."""
    size, views, some = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 11])), draw(st.integers(1, 3)), st.integers(1, 5)
    kind = draw(st.sampled_from(["training", "encode", "decode"]))
    if kind == "training":
        return Pass(size, draw(some), draw(some), 0, 0, draw(st.booleans()), views)
    past = draw(st.integers(0, 4))
    if kind == "encode":
        return Pass(size, 0, draw(some), past, past, False, 1)
    return Pass(size, draw(some), 0, draw(st.integers(0, 4)), past, False, views)


def inputs(mask: AttentionMask, batch: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    counts = (len(mask.queries), len(mask.keys), len(mask.keys), len(mask.queries))
    q, k, v, above = (
        torch.randn(batch, HEADS, count, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for count in counts
    )
    return [*(x.requires_grad_() for x in (q, k, v)), above]


def in_stripes(mask: AttentionMask, q: Tensor, k: Tensor, v: Tensor, above: Tensor) -> list[Tensor]:
    output = attend_in_stripes(q, k, v, mask)
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), above)]


def by_definition(mask: AttentionMask, q: Tensor, k: Tensor, v: Tensor, above: Tensor) -> list[Tensor]:
    output = (q @ k.transpose(-1, -2)).masked_fill(~mask.dense, -torch.inf).softmax(-1) @ v
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), above)]


@given(
    passes(),
    st.sampled_from([1, 4, 8, 128]),
    st.sampled_from([1, 2000, 2**24]),
    st.none() | st.lists(st.lists(st.integers(0, 98), max_size=6, unique=True).map(sorted), min_size=2, max_size=2),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=200)
def test_stripes_are_softmax_under_the_mask(
    given_pass: Pass, rows: int, score_bytes: int, starts: list[list[int]] | None, seed: int
) -> None:
    """Several stripes, blocks longer than one, heads all at once and in parts; gradients of keys are summed in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stripes, "ROWS", rows)
        patch.setattr(stripe_attention, "SCORE_BYTES", score_bytes)
        mask = given_pass.mask()
        if starts is not None:
            mask = mask.restrict_to_documents(numbers(starts, 99))
        assert mask.layout is not None
        q, k, v, above = inputs(mask, 2, torch.float64, seed)
        output, d_q, d_k, d_v = in_stripes(mask, q, k, v, above)
    expected = by_definition(mask, q, k, v, above)
    torch.testing.assert_close([output, d_q], expected[:2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close([d_k, d_v], expected[2:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_bf16(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of order 1 from scores and weights rounded to 8 bits: 2% of the largest, in outputs and gradients."""
    monkeypatch.setattr(stripes, "ROWS", 16)
    mask = Pass(size, 64 // size, 64 // size, 0, 0, False, 2).mask()
    low = inputs(mask, 2, torch.bfloat16)
    high = [x.detach().float().requires_grad_(x.requires_grad) for x in low]
    for ours, exact in zip(in_stripes(mask, *low), in_stripes(mask, *high), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("size", [4, 64])
def test_memory_grows_with_the_length(size: int, with_documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the length, at most four times the largest tensor, masks and gradients included; never Q x K."""
    monkeypatch.setattr(stripes, "ROWS", 16)
    monkeypatch.setattr(stripe_attention, "SCORE_BYTES", 1)

    def largest(length: int) -> int:
        with LargestTensor() as seen:
            mask = Pass(size, length // size, length // size, 0, 0, False, 2).mask()
            if with_documents:
                mask = mask.restrict_to_documents(numbers([[0, length // 2]], length))
            in_stripes(mask, *inputs(mask, 1, torch.float32))
        assert seen.numel < len(mask.queries) * len(mask.keys) / 4
        return seen.numel

    assert largest(1024) <= 4.01 * largest(256)


@pytest.mark.parametrize(
    ("noisy", "clean", "start", "past"), [(6, 8, 0, 0), (8, 6, 0, 0), (4, 0, 2, 0), (4, 4, 4, 4), (0, 4, 4, 0)]
)
def test_other_passes_have_no_layout(noisy: int, clean: int, start: int, past: int) -> None:
    """Parts of blocks, and clean tokens that are not one piece: other backends take these."""
    assert pass_mask(noisy, clean, start, past, 4, False, CPU).layout is None
