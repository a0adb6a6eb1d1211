"""Sampling does not make a GPU's host wait where it knows the answer, and fills the memory that a GPU has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bd3_ds.model.dit import DiT, DiTConfig
from bd3_ds.sampling import denoiser as denoiser_module
from bd3_ds.sampling.denoiser import LOGITS_AT_ONCE, CachedDenoiser, CausalDenoiser, logits_at_once
from bd3_ds.sampling.options import Options
from bd3_ds.sampling.sampler import Samples, _Block, _denoise
from bd3_ds.sampling.unmasking import make_policy

# A device without values: reading one, or a shape that depends on one, is an error.
META = torch.device("meta")
ROWS, SIZE, VOCAB = 3, 4, 11


def blank() -> Samples:
    tokens = torch.zeros(ROWS, 2 * SIZE, dtype=torch.long, device=META)
    counts = torch.zeros(ROWS, dtype=torch.long, device=META)
    return Samples(
        tokens, counts, counts, counts.clone(), counts, torch.zeros_like(tokens), tokens.to(dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("causal", "how"),
    [(False, {}), (False, {"steps": 3}), (True, {}), (False, {"repetition_penalty": 1.5}), (False, {"top_k": 3})],
)
def test_orders_that_look_at_no_prediction_never_wait(causal: bool, how: dict[str, Any]) -> None:
    """A whole block behind clean tokens, one row of which has fewer masks than the others."""
    size = 1 if causal else SIZE
    model = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, causal)).eval().to(META)
    options = Options(**how)
    masked = torch.ones(ROWS, size, dtype=torch.bool)
    masked[0, 1:] = False
    torch.manual_seed(1)
    policy = make_policy(options, torch.rand(ROWS, size, dtype=torch.float64), VOCAB)
    network = CausalDenoiser(model) if causal else CachedDenoiser(model, SIZE)
    written: list[int] = []
    with torch.no_grad():
        network.extend(torch.zeros(ROWS, SIZE, dtype=torch.long, device=META))
        uniform = torch.zeros(ROWS, size, dtype=torch.float64, device=META)
        block = _Block(torch.arange(ROWS, device=META), SIZE, SIZE + size, masked, policy, uniform)
        _denoise(network, blank(), block, VOCAB - 1, options, False, written.append)
    assert sum(written) == int(masked.sum())


def test_a_gpu_draws_from_as_many_logits_as_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free, reserved, allocated = 60 * 2**30, 8 * 2**30, 6 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    gpu, asked = torch.device("cuda", 0), 64 * 1024 * 50_258
    assert -(-asked // logits_at_once(gpu)) <= 16
    held = logits_at_once(gpu) * denoiser_module.BYTES_A_LOGIT
    assert held <= (free + reserved - allocated) / 4
    free, allocated = 0, reserved
    assert logits_at_once(gpu) == LOGITS_AT_ONCE == logits_at_once(torch.device("cpu"))
