"""Attention backends against the dense one, which is the definition."""

from __future__ import annotations

import torch

from bd3_ds.model.attention.attention import attend
from bd3_ds.model.attention.masks import AttentionMask


def assert_backends_agree(mask: AttentionMask, batch: int) -> None:
    """Outputs and gradients of sdpa, stripes and `auto` on a CPU are those of dense for `batch` random rows."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = len(mask.queries), len(mask.keys)
    q, k, v = (
        torch.randn(batch, 2, count, 8, generator=generator, requires_grad=True) for count in (queries, keys, keys)
    )
    direction = torch.randn(batch, 2, queries, 8, generator=generator)
    results = []
    for backend in ("dense", "sdpa", "stripes", "auto"):
        output = attend(q, k, v, mask, backend)
        results.append([output, *torch.autograd.grad((output * direction).sum(), (q, k, v))])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
