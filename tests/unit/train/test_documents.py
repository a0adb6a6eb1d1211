"""Who sees whom where a sequence holds several documents: the rule, the backends, the passes and the cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.schema import AR, BD3, SEDD
from bd3_ds.diffusion.subs import SubsNats, subs_nll
from bd3_ds.evaluation.denoisers import conditioned, scored_network
from bd3_ds.model.attention.attention import attend
from bd3_ds.model.attention.masks import CLEAN, AttentionMask, TokenLayout, pass_mask, places
from bd3_ds.model.dit import DiT, DiTConfig
from bd3_ds.model.kv_cache import KVCache
from tests.helpers.attention import assert_backends_agree
from tests.helpers.documents import ANYWHERE, CASES, each_alone, numbers
from tests.helpers.tiny import LENGTH

CPU = torch.device("cpu")
VOCAB, MASK = 13, 12


def network(causal: bool = False, attention: str = "dense") -> DiT:
    """Random weights everywhere, so that nothing cancels."""
    model = DiT(DiTConfig(VOCAB, 16, 3, 2, 2, 8, causal, attention=attention)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def texts(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, MASK, (rows, LENGTH), generator=generator)
    return torch.where(torch.rand(x0.shape, generator=generator) < 0.5, MASK, x0), x0


@given(st.lists(st.lists(st.integers(0, 9), max_size=6).map(sorted), min_size=1, max_size=4))
def test_a_document_is_the_starts_up_to_it(starts: list[list[int]]) -> None:
    expected = [[sum(start <= i for start in row) for i in range(10)] for row in starts]
    assert numbers(starts, 10).tolist() == expected


def by_definition(queries: TokenLayout, keys: TokenLayout, documents: list[int]) -> Tensor:
    """The block rule in the three cases of Arriola et al. 2025 (figure 2), and the same document."""

    def sees(q: tuple[int, int, int], k: tuple[int, int, int]) -> bool:
        (q_view, q_position, q_block), (k_view, k_position, k_block) = q, k
        if documents[q_position] != documents[k_position]:
            return False
        if k_view != CLEAN:
            return q_view == k_view and q_block == k_block
        return k_block < q_block or (q_view == CLEAN and k_block == q_block)

    def listed(tokens: TokenLayout) -> list[tuple[int, int, int]]:
        columns = (tokens.view.tolist(), tokens.position.tolist(), tokens.block.tolist())
        return list(zip(*columns, strict=True))

    return torch.tensor([[sees(q, k) for k in listed(keys)] for q in listed(queries)])


row_starts = st.lists(st.lists(st.integers(0, 31), max_size=5, unique=True).map(sorted), min_size=1, max_size=3)


@given(row_starts, st.sampled_from([1, 2, 4, 8]), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2))
@settings(deadline=None)
def test_views_beside_a_clean_text(starts: list[list[int]], size: int, blocks: int, views: int, past: int) -> None:
    start, count = past * size, blocks * size
    packed = places(CLEAN, 0, start + count, size, CPU)
    for view in range(views):
        packed = packed + places(view, start, count, size, CPU)
    documents = numbers(starts, 32)
    dense = AttentionMask(packed, packed).restrict_to_documents(documents).dense
    expected = torch.stack([by_definition(packed, packed, row.tolist()) for row in documents])
    assert torch.equal(dense, expected[:, None])
    assert dense.diagonal(dim1=-2, dim2=-1).all()  # no softmax over nothing


@given(row_starts, st.sampled_from([1, 2, 4]), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.booleans())
@settings(deadline=None)
def test_masks_of_a_pass(
    starts: list[list[int]], size: int, noisy: int, clean: int, past: int, noisy_only: bool
) -> None:
    """Whatever the documents, such a mask is neither full nor causal: backends may take no short cut."""
    if not noisy and (not clean or noisy_only):
        return
    documents = numbers(starts, 32)
    rule = pass_mask(noisy * size, clean * size, past * size, past * size, size, noisy_only, CPU)
    mask = rule.restrict_to_documents(documents)
    expected = torch.stack([by_definition(mask.queries, mask.keys, row.tolist()) for row in documents])
    assert torch.equal(mask.dense, expected[:, None])
    assert not mask.is_full and not mask.is_causal
    assert rule.documents is None and rule.dense.dim() == 2  # the shared rule stays as it was


PASSES = [(16, 16, 0, 4), (16, 16, 0, 1), (4, 0, 12, 4), (0, 16, 0, 1), (16, 0, 0, 16)]  # noisy, clean, past, L'


@pytest.mark.parametrize(("noisy", "clean", "past", "size"), PASSES)
def test_backends_are_dense(noisy: int, clean: int, past: int, size: int) -> None:
    """Outputs and gradients of sdpa, and of `auto` on a CPU, where the rule alone may be full or causal."""
    assert_backends_agree(
        pass_mask(noisy, clean, past, past, size, False, CPU).restrict_to_documents(numbers(ANYWHERE)), batch=3
    )


@pytest.mark.parametrize(("noisy", "clean", "past", "size"), PASSES)
def test_flex_has_the_same_rule(noisy: int, clean: int, past: int, size: int) -> None:
    mask = pass_mask(noisy, clean, past, past, size, False, CPU).restrict_to_documents(numbers(ANYWHERE))
    b, i = torch.arange(3)[:, None, None], torch.arange(len(mask.queries))[:, None]
    j = torch.arange(len(mask.keys))
    assert torch.equal(mask.flex.mask_mod(b, torch.tensor(0), i, j), mask.dense[:, 0])


def test_flex_skips_other_documents() -> None:
    """Tiles of 128 x 128 tokens in which no pair shares a document, row by row."""
    mask = pass_mask(0, 512, 0, 0, 1, False, CPU).restrict_to_documents(numbers([[0, 128, 300], [256], []], 512))
    tiles = mask.dense.unfold(2, 128, 128).unfold(3, 128, 128).any(-1).any(-1)  # [B, 1, 4, 4]
    assert torch.equal(mask.flex.to_dense().bool(), tiles)
    assert [int(row.sum()) for row in tiles] == [6, 6, 10]


@pytest.mark.slow
def test_compiled_flex_follows_the_documents() -> None:
    """One kernel, compiled once: it must take each micro-batch's own documents."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 16, generator=generator) for _ in range(3))
    for seed in range(3):
        starts = np.random.default_rng(seed).integers(0, 64, (2, 4))
        mask = pass_mask(32, 32, 0, 0, 4, False, CPU).restrict_to_documents(numbers(starts.tolist(), 32 * 2))
        with torch.no_grad():
            outputs = [attend(q, k, v, mask, backend) for backend in ("flex", "dense")]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "sdpa", "stripes"])
@pytest.mark.parametrize(("objective", "size", "starts"), CASES)
def test_a_document_in_a_row_is_the_document_alone(
    objective: str, size: int, starts: list[list[int]], backend: str
) -> None:
    """Rotary positions are relative, so a document's logits do not depend on where in the row it stands."""
    x_t, x0 = texts()
    model, sigma = network(objective == AR, backend), torch.tensor([0.1, 1.0, 3.0]) if objective == SEDD else None
    x_t, clean = (x0, None) if objective == AR else (x_t, x0 if objective == BD3 else None)
    packed = model(x_t, clean, block_size=size, sigma=sigma, documents=numbers(starts))
    torch.testing.assert_close(packed, each_alone(model, x_t, clean, size, starts, sigma), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("causal", "size"), [(True, 1), (False, 1), (False, 4), (False, 16)])
def test_nothing_leaks(causal: bool, size: int) -> None:
    """A token's logits change with what the rule shows it, and never with another document, in its block or not."""
    starts = [0, 5, 6, 11]
    documents = numbers([starts])
    of = documents[0].tolist()
    x_t, x0 = texts(1)
    model = network(causal)
    inputs = [x0] if causal else [x_t, x0]

    def logits(tokens: list[Tensor]) -> Tensor:
        return model(*tokens, block_size=size, documents=documents)

    before = logits(inputs)
    for place, which in itertools.product(range(LENGTH), range(len(inputs))):
        changed = [text.clone() for text in inputs]
        changed[which][:, place] = (changed[which][:, place] + 1) % VOCAB
        after = logits(changed)
        moved = {i for i in range(LENGTH) if not torch.allclose(after[:, i], before[:, i], atol=1e-6)}
        own, own_block = place // size, [i for i in range(LENGTH) if i // size == place // size]
        if causal:
            shown = list(range(place, LENGTH))
        elif which == 0:
            shown = own_block
        else:
            shown = [i for i in range(LENGTH) if i // size > own]
        assert moved == {i for i in shown if of[i] == of[place]}


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_cached_blocks_are_the_whole_pass(size: int) -> None:
    """Block after block against a growing cache, and all blocks of several views against a full one."""
    x_t, x0 = texts()
    documents, model, cache = numbers(ANYWHERE), network(), KVCache(3)
    whole = model(x_t, x0, block_size=size, documents=documents)
    for start in range(0, LENGTH, size):
        block = slice(start, start + size)
        logits = model.decode(x_t[:, block], cache, start=start, block_size=size, documents=documents)
        torch.testing.assert_close(logits, whole[:, block], rtol=1e-4, atol=1e-4)
        model.encode(x0[:, block], cache, block_size=size, documents=documents)

    views = torch.stack([x_t, x0, x_t.flip(1)], dim=1)  # [3, 3, L]
    denoise = conditioned(model, size, documents)(x0)
    targets = torch.arange(views.numel()) % MASK
    _, nats = denoise(views, torch.arange(views.numel()), SubsNats(targets, MASK))
    by_view = denoise(views, torch.arange(views.numel()), None).view(*views.shape, VOCAB)
    torch.testing.assert_close(nats, subs_nll(by_view.flatten(0, 2), targets, MASK))
    for view in range(3):
        expected = model(views[:, view], x0, block_size=size, documents=documents)
        torch.testing.assert_close(by_view[:, view], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "sdpa", "stripes"])
@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_views_share_the_documents_of_their_text(size: int, backend: str) -> None:
    """One pass over K views of each text, as in training, where `documents` has a row for each text, not each view."""
    x_t, x0 = texts()
    documents, model = numbers(ANYWHERE), network(attention=backend)
    views = torch.stack([x_t, x_t.flip(1)], dim=1)  # [3, 2, L]
    together = model(views.flatten(0, 1), x0, block_size=size, documents=documents).view(*views.shape, VOCAB)
    for view in range(2):
        expected = model(views[:, view], x0, block_size=size, documents=documents)
        torch.testing.assert_close(together[:, view], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 10]])
def test_cached_tokens_are_the_causal_pass(pieces: list[int]) -> None:
    _, x0 = texts()
    documents, model, cache = numbers(ANYWHERE), network(causal=True), KVCache(3)
    whole, start = model(x0, block_size=1, documents=documents), 0
    at, targets = torch.arange(LENGTH - 1), x0[0, 1:]
    _, nats = scored_network(model, 1, documents)(None)(x0, None, at, SubsNats(targets, MASK))
    torch.testing.assert_close(nats, subs_nll(whole[0, :-1], targets, MASK))
    for count in pieces:
        tokens = x0[:, start : start + count]
        logits = model.decode(tokens, cache, start=start, block_size=1, documents=documents)
        torch.testing.assert_close(logits, whole[:, start : start + count], rtol=1e-4, atol=1e-4)
        start += count
