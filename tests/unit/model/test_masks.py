"""Who sees whom: the rule, the backends that carry it out, the cache, and what they cost."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.schema import AR, BD3, MDLM
from bd3_ds.model.attention.masks import CLEAN, AttentionMask, pass_mask, places
from bd3_ds.model.dit import DiT, DiTConfig
from bd3_ds.model.flops import training_flops_per_sequence
from bd3_ds.model.kv_cache import KVCache
from tests.helpers.attention import assert_backends_agree

CPU = torch.device("cpu")
VOCAB, LENGTH = 13, 16
BACKENDS = ("dense", "sdpa", "stripes")


class Token(NamedTuple):
    """One packed token: clean, or noisy in a view; and its block."""

    view: int | None
    block: int


def sees(query: Token, key: Token) -> bool:
    """The definition, in the three cases of Arriola et al. 2025 (figure 2)."""
    if query.view is not None and key.view is not None:  # noisy to noisy: block-diagonal, each view alone
        return query.view == key.view and query.block == key.block
    if query.view is not None:  # noisy to clean: earlier blocks
        return key.block < query.block
    if key.view is None:  # clean to clean: block-causal
        return key.block <= query.block
    return False  # clean to noisy


def tokens(view: int | None, start: int, count: int, size: int) -> list[Token]:
    return [Token(view, position // size) for position in range(start, start + count)]


def by_definition(queries: list[Token], keys: list[Token]) -> Tensor:
    return torch.tensor([[sees(query, key) for key in keys] for query in queries])


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
@settings(deadline=None)
def test_views_beside_a_clean_text(size: int, blocks: int, views: int, past: int) -> None:
    """Several noisy views of the blocks behind `past` ones, with all clean tokens, in one packed sequence."""
    start, count = past * size, blocks * size
    packed = places(CLEAN, 0, start + count, size, CPU)
    expected = tokens(None, 0, start + count, size)
    for view in range(views):
        packed = packed + places(view, start, count, size, CPU)
        expected += tokens(view, start, count, size)
    mask = AttentionMask(packed, packed)
    assert torch.equal(mask.dense, by_definition(expected, expected))
    assert mask.dense.diagonal().all()  # no softmax over nothing


@given(
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 2),
    st.booleans(),
    st.integers(1, 3),
)
@settings(deadline=None)
def test_masks_of_a_pass(size: int, noisy: int, clean: int, past: int, noisy_only: bool, views: int) -> None:
    """Noisy and clean blocks behind a cache; with `noisy_only`, the last layer's, where clean tokens ask nothing."""
    if not noisy and (not clean or noisy_only):
        return
    start, noisy, clean = past * size, noisy * size, clean * size
    mask = pass_mask(noisy, clean, start, start, size, noisy_only, CPU, views)
    ask = [token for view in range(views) for token in tokens(view, start, noisy, size)]
    fresh = tokens(None, start, clean, size)
    expected = by_definition(ask if noisy_only else ask + fresh, tokens(None, 0, start, size) + ask + fresh)
    assert torch.equal(mask.dense, expected)
    without_layout = AttentionMask(mask.queries, mask.keys)  # asks the matrix itself
    assert mask.is_full == without_layout.is_full == bool(expected.all())
    lower = torch.ones_like(expected).tril()
    is_causal = expected.shape[0] == expected.shape[1] and torch.equal(expected, lower)
    assert mask.is_causal == without_layout.is_causal == is_causal
    if mask.layout is not None:
        assert mask.layout.full == bool(mask.dense.all())
        if len(mask.queries) == len(mask.keys):
            assert mask.layout.causal == is_causal


def test_the_rule_has_the_known_masks_as_cases() -> None:
    assert pass_mask(0, 8, 0, 0, 1, False, CPU).is_causal  # AR
    assert pass_mask(8, 0, 0, 0, 8, False, CPU).is_full  # MDLM, SEDD


@pytest.mark.parametrize(("noisy", "clean", "past"), [(16, 16, 0), (4, 0, 8), (0, 16, 0), (16, 0, 0)])
def test_flex_has_the_same_rule(noisy: int, clean: int, past: int) -> None:
    mask = pass_mask(noisy, clean, past, past, 4, False, CPU)
    i, j = torch.arange(len(mask.queries))[:, None], torch.arange(len(mask.keys))[None, :]
    zero = torch.tensor(0)
    assert torch.equal(mask.flex.mask_mod(zero, zero, i, j), mask.dense)  # type: ignore[attr-defined]


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    ("noisy", "clean", "past", "size"),
    [
        (16, 16, 0, 4),
        (16, 16, 0, 1),
        (4, 0, 12, 4),
        (0, 16, 0, 4),
        (0, 16, 0, 1),
        (16, 0, 0, 16),
    ],
)
def test_backends_are_dense(noisy: int, clean: int, past: int, size: int, views: int) -> None:
    """Outputs and gradients; masked, causal and full alike."""
    assert_backends_agree(pass_mask(noisy, clean, past, past, size, False, CPU, views), batch=2)


def network(attention: str, causal: bool = False) -> DiT:
    """Random weights everywhere, the same for each backend."""
    model = DiT(DiTConfig(VOCAB, 16, 3, 2, 2, 8, causal, attention=attention)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, VOCAB - 1, (2, LENGTH), generator=generator)
    return torch.where(torch.rand(x0.shape, generator=generator) < 0.5, VOCAB - 1, x0), x0


@pytest.mark.parametrize(("causal", "size"), [(True, 1), (False, 1), (False, 4), (False, 16)])
def test_backends_train_alike(causal: bool, size: int) -> None:
    x_t, x0 = texts()
    results = []
    for backend in BACKENDS:
        model = network(backend, causal)
        logits = model(x0 if causal else x_t, None if causal else x0, block_size=size)
        results.append([logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_cached_blocks_are_the_whole_pass(backend: str, size: int) -> None:
    """Block after block against a growing cache, as in sampling, gives the logits of one training pass."""
    x_t, x0 = texts()
    model, cache = network(backend), KVCache(3)
    whole = model(x_t, x0, block_size=size)
    for start in range(0, LENGTH, size):
        block = slice(start, start + size)
        logits = model.decode(x_t[:, block], cache, start=start, block_size=size)
        torch.testing.assert_close(logits, whole[:, block], rtol=1e-4, atol=1e-4)
        assert len(cache) == start
        model.encode(x0[:, block], cache, block_size=size)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_views_are_passes_of_their_own(backend: str, size: int) -> None:
    """K views beside one clean pass, or against its cache, have the logits that each would have alone."""
    x_t, x0 = texts()
    views = torch.stack([x_t, x0, x_t.flip(1)], dim=1).flatten(0, 1)  # [2 x 3, L]
    model, cache = network(backend), KVCache(3)
    alone = model(views, x0.repeat_interleave(3, dim=0), block_size=size)
    torch.testing.assert_close(model(views, x0, block_size=size), alone, rtol=1e-4, atol=1e-4)
    model.encode(x0, cache, block_size=size)
    torch.testing.assert_close(model.decode(views, cache, start=0, block_size=size), alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 10]])
def test_cached_tokens_are_the_causal_pass(backend: str, pieces: list[int]) -> None:
    _, x0 = texts()
    model, cache = network(backend, causal=True), KVCache(3)
    whole, start = model(x0, block_size=1), 0
    for count in pieces:
        logits = model.decode(x0[:, start : start + count], cache, start=start, block_size=1)
        torch.testing.assert_close(logits, whole[:, start : start + count], rtol=1e-4, atol=1e-4)
        start += count


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_nothing_leaks(backend: str, size: int) -> None:
    """A token's logits change with its own noisy block and with earlier clean blocks, and with nothing else."""
    x_t, x0 = texts()
    model = network(backend)
    before = model(x_t, x0, block_size=size)
    for place, (which, text) in itertools.product((0, 5, 10, 15), enumerate((x_t, x0))):
        changed = text.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = model(changed if which == 0 else x_t, x0 if which == 0 else changed, block_size=size)
        moved = {i // size for i in range(LENGTH) if not torch.allclose(after[:, i], before[:, i], atol=1e-6)}
        own, blocks = place // size, LENGTH // size
        assert moved == ({own} if which == 0 else set(range(own + 1, blocks)))


@pytest.mark.parametrize(
    ("objective", "size"), [(AR, 1), (MDLM, 16), (BD3, 16), (BD3, 1), (BD3, 2), (BD3, 4), (BD3, 8)]
)
def test_operations_are_counted_by_pairs(objective: str, size: int) -> None:
    """Projections by tokens, attention by pairs; the last layer's clean tokens give keys and values alone."""
    net = DiTConfig(VOCAB, 12, 3, 2, 4, 8, objective == AR)
    noisy = [] if objective == AR else tokens(0, 0, LENGTH, size)
    clean = tokens(None, 0, LENGTH, size) if objective == AR or size < LENGTH else []
    width, total = net.hidden_size, 0.0
    for layer in range(net.layers):
        last = layer == net.layers - 1 and noisy
        ask = noisy if last else noisy + clean
        silent = len(noisy + clean) - len(ask)
        pairs = sum(sees(query, key) for query in ask for key in noisy + clean)
        total += len(ask) * 2 * (4 + 2 * net.mlp_ratio) * width**2 + silent * 2 * 2 * width**2 + 4 * width * pairs
    scored = LENGTH - 1 if objective == AR else (LENGTH - 1) / 2
    expected = 3 * (total + scored * 2 * width * VOCAB)
    assert training_flops_per_sequence(net, objective, LENGTH, size) == pytest.approx(expected, rel=1e-12)
