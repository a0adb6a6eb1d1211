"""Attention backends by name: which runs where, one of a user's, and keys that heads of queries share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_ds.config.check import check_run
from bd3_ds.config.registries import ATTENTION, AttentionBackend
from bd3_ds.model.attention.attention import attend, backend_for
from bd3_ds.model.attention.masks import pass_mask
from bd3_ds.runtime.errors import UserError
from bd3_ds.train.hardware import check_hardware
from tests.helpers.tiny import tiny_run

CPU = torch.device("cpu")


@pytest.fixture
def mine() -> Iterator[None]:
    """A backend that trains on GPUs alone, and gives ones."""
    ATTENTION.register("ones", AttentionBackend(lambda q, k, v, mask: torch.ones_like(q), trains_on=("cuda",)))
    yield
    ATTENTION.remove("ones")


@pytest.mark.parametrize(
    ("name", "cuda", "hides", "runs"),
    [
        ("auto", False, False, "sdpa"),
        ("auto", False, True, "stripes"),
        ("auto", True, False, "sdpa"),
        ("auto", True, True, "flex"),
        ("stripes", True, True, "flex"),  # an export of a run on CPUs
        ("stripes", False, False, "stripes"),
        ("flex", False, True, "flex"),
        ("dense", True, True, "dense"),
    ],
)
def test_which_runs(name: str, cuda: bool, hides: bool, runs: str) -> None:
    assert backend_for(name, cuda, lambda: hides) == runs


def test_one_of_the_user_s(mine: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 8, 4)
    assert bool((attend(q, q, q, pass_mask(4, 4, 0, 0, 2, False, CPU), "ones") == 1).all())
    run = tiny_run(tmp_path, "model.attention=ones")
    check_run(run, world_size=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"model\.attention=ones does not train on CPUs; use auto, dense, sdpa or stripes"
    ):
        check_hardware(run)


@pytest.mark.parametrize("backend", ["dense", "sdpa", "stripes"])
@pytest.mark.parametrize("clean", [0, 8])  # nothing hidden, blocks
def test_heads_share_keys(backend: str, clean: int) -> None:
    """Outputs and gradients of two heads of keys under six of queries are those of keys repeated by hand."""
    mask = pass_mask(8, clean, 0, 0, 4 if clean else 8, False, CPU)
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        shape = (2, heads, 8 + clean, 4)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = drawn(6), drawn(2), drawn(2)
    direction = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    results = []
    for keys, values in ((k, v), (k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))):
        output = attend(q, keys, values, mask, backend)
        results.append([output, *torch.autograd.grad((output * direction).sum(), (q, k, v), retain_graph=True)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
