"""The tables that flex_attention skips tiles by: those of the dense mask, without a dense mask."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bd3_ds.model.attention.attention import attend
from bd3_ds.model.attention.backends import flex as backend
from bd3_ds.model.attention.masks import AttentionMask, pass_mask
from bd3_ds.model.attention.tiles import TILE

CPU = torch.device("cpu")
# noisy, clean, past tokens, block size, noisy queries alone, views
PASSES = [
    (384, 384, 0, 16, False, 1),  # training
    (384, 384, 0, 16, True, 1),  # its last layer
    (384, 384, 0, 128, False, 2),
    (200, 200, 0, 8, False, 3),  # tiles that hold two streams, and a cut one at the end
    (200, 200, 0, 8, True, 3),
    (300, 300, 0, 1, False, 1),
    (300, 300, 0, 300, False, 1),
    (0, 300, 0, 1, False, 1),  # AR
    (0, 300, 100, 4, False, 1),  # a prompt behind a cache
    (256, 0, 128, 4, False, 2),  # views behind a cache
    (16, 0, 300, 16, False, 1),
]


def brute(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of a dense mask [B or none, Q, K]: with some pair visible, with all; cut tiles are not whole."""
    *_, rows, columns = dense.shape
    dense = dense.view(-1, rows, columns)
    padded = torch.nn.functional.pad(dense, (0, -columns % TILE, 0, -rows % TILE))
    tiles = padded.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE))
    return tiles.any(4).any(2), tiles.all(4).all(2)


def tables(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Partly hidden and full tiles [B, q, k] as the tables list them."""
    found = []
    for number, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        assert number is not None and indices is not None
        dense = torch.zeros(indices.shape, dtype=torch.bool)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in number.shape)).view(-1, number.dim()).tolist():
            dense[tuple(place)][indices[tuple(place)][: number[tuple(place)]].long()] = True
        found.append(dense[:, 0])
    return found[0], found[1]


def assert_tables(mask: AttentionMask, exact: bool = True) -> None:
    """The BlockMask lists all tiles with a visible pair, and, `exact`, no other; full ones without a rule to ask."""
    some, every = brute(mask.dense)
    flex = mask.flex
    assert isinstance(flex, BlockMask)
    partly, full = tables(flex)
    assert torch.equal(full, every) and not (partly & full).any()
    assert torch.equal(partly | full, some) if exact else bool((some <= (partly | full)).all())
    assert flex.seq_lengths == (len(mask.queries), len(mask.keys))


def documents_of(rows: int, length: int, seed: int) -> Tensor:
    """Documents of random lengths; padding ends the first row, and the middle of the second holds some."""
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(rows, length, generator=generator) < 3 / length).long().cumsum(1)
    documents[0, -length // 4 :] = -1
    documents[-1, length // 3 : length // 2] = -1
    return documents


@pytest.mark.parametrize("given_pass", PASSES)
def test_tables_are_those_of_the_dense_mask(given_pass: tuple[int, int, int, int, bool, int]) -> None:
    noisy, clean, past, size, noisy_only, views = given_pass
    mask = pass_mask(noisy, clean, past, past, size, noisy_only, CPU, views)
    assert_tables(mask)
    for seed in range(3):
        assert_tables(mask.restrict_to_documents(documents_of(2, past + max(noisy, clean), seed)), exact=False)


@given(
    st.sampled_from([1, 2, 4, 32, 64]),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_tables_of_any_pass(size: int, blocks: int, clean: bool, past: int, noisy_only: bool, views: int) -> None:
    if not blocks:
        return
    count = size * blocks
    assert_tables(pass_mask(count, count if clean else 0, past * size, past * size, size, noisy_only, CPU, views))


def test_tables_are_torchs_own() -> None:
    mask = pass_mask(300, 300, 0, 0, 4, False, CPU, 1)
    ours = mask.flex
    assert isinstance(ours, BlockMask)
    theirs = create_block_mask(ours.mask_mod, None, None, 600, 600, device="cpu")
    for one, other in zip(tables(ours), tables(theirs), strict=True):
        assert torch.equal(one, other)
    for name in ("q_num_blocks", "full_q_num_blocks", "kv_num_blocks", "full_kv_num_blocks", "kv_indices"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
        assert getattr(ours, name).shape == getattr(theirs, name).shape, name


def test_one_document_hides_nothing_more() -> None:
    """A text of one document has the tables of the rule alone, in each row."""
    mask = pass_mask(384, 384, 0, 0, 16, False, CPU, 1)
    narrowed = mask.restrict_to_documents(torch.zeros(2, 384, dtype=torch.long))
    for one, other in zip(tables(narrowed.flex), tables(mask.flex), strict=True):  # type: ignore[arg-type]
        assert torch.equal(one, other.expand_as(one))


def test_documents_far_apart_are_passed_over() -> None:
    """Three documents of a tile each: behind the block's own tile, a query's tile has the clean one of its document."""
    mask = pass_mask(0, 384, 0, 0, 4, False, CPU, 1).restrict_to_documents(torch.arange(3).repeat_interleave(128)[None])
    partly, full = tables(mask.flex)  # type: ignore[arg-type]
    assert torch.equal((partly | full)[0], torch.eye(3, dtype=torch.bool))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return made


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_mask_is_never_dense(packed: bool) -> None:
    """32k x 32k pairs are a gigabyte of booleans; what is made has a few numbers a token and tile."""
    length = 16_384
    mask = pass_mask(length, length, 0, 0, 16, False, CPU, 1)
    if packed:
        mask = mask.restrict_to_documents(documents_of(2, length, 0))
    largest = Largest()
    with largest:
        assert isinstance(mask.flex, BlockMask)
    tiles = (2 * length // TILE) ** 2
    assert 0 < largest.elements <= 4 * max(4 * length, tiles)


def test_tables_of_documents_need_no_value_from_the_device() -> None:
    """They are made once a micro-batch, and a GPU's host must not wait for them."""
    mask = pass_mask(256, 256, 0, 0, 16, False, CPU, 1)
    some, every = mask.tiles.some, mask.tiles.every
    meta = pass_mask(256, 256, 0, 0, 16, False, torch.device("meta"), 1)
    meta.__dict__["tiles"] = type(mask.tiles)(some.to("meta"), every.to("meta"))  # of the rule: made once a run
    narrowed = meta.restrict_to_documents(documents_of(2, 256, 0).to("meta"))
    assert narrowed.tiles.ordered()[0].device.type == "meta"


@pytest.mark.parametrize("given_pass", PASSES[:5])
def test_attention_by_the_tables_is_dense_attention(given_pass: tuple[int, int, int, int, bool, int]) -> None:
    noisy, clean, past, size, noisy_only, views = given_pass
    mask = pass_mask(noisy, clean, past, past, size, noisy_only, CPU, views)
    for each in (mask, mask.restrict_to_documents(documents_of(2, past + max(noisy, clean), 1))):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 2, len(x), 8, generator=generator) for x in (each.queries, each.keys, each.keys))
        torch.testing.assert_close(
            flex_attention(q, k, v, block_mask=each.flex, scale=1.0),  # type: ignore[arg-type]
            attend(q, k, v, each, "dense"),
            rtol=1e-4,
            atol=1e-5,
        )


def test_many_shapes_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lengths in two types, with gradients and without, have compiled code; none falls back to the eager form.

    The compiler is torch's own tracing with the eager operators behind it: what falls back is the tracing's matter.
    """
    monkeypatch.setattr(backend, "COMPILER", "eager")
    monkeypatch.setattr(backend, "SHAPES", 2)
    monkeypatch.setattr(backend, "_OWN_CODE", set())
    backend._compiled.cache_clear()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length, dtype in itertools.product((16, 64, 160), (torch.float32, torch.bfloat16)):
            mask = pass_mask(length, length, 0, 0, 4, False, CPU, 1)
            q = torch.randn(1, 1, 2 * length, 8, dtype=dtype)  # wants no gradient: a CPU has no backward pass
            for trained in (True, False):
                with torch.set_grad_enabled(trained):
                    assert attend(q, q, q, mask, "flex").shape == q.shape
    backend._compiled.cache_clear()
    torch._dynamo.reset()
