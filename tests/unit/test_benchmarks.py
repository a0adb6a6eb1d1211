"""What the benchmarks compare is the same work: the reference is our network, and the counted FLOPs are one count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bd3_ds.config.schema import AR, BD3, MDLM
from bd3_ds.diffusion.noise import corrupt, make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.diffusion.weighting import WeightConfig
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from bd3_ds.model.flops import training_flops_per_sequence
from benchmarks import costs, upstream
from benchmarks.reference import Reference, dense_mask, negative_log_likelihood
from tests.helpers.schedules import schedule_config

VOCAB, LENGTH = 13, 16
NET = DiTConfig(VOCAB, 16, 3, 2, 4, 8, False)
OUR_NAMES = {
    "time.0": "time.expand",
    "time.2": "time.mix",
    "norm": "head.norm",
    "modulation": "head.modulation",
    "head": "head.linear",
    "mlp.0": "up",
    "mlp.2": "down",
}


def our_name(key: str) -> str:
    """The parameter of a DiT that a parameter of the reference stands for."""
    stem, _, leaf = key.rpartition(".")
    if stem.startswith("blocks."):
        _, layer, part = stem.split(".", 2)
        return f"layers.{layer}.{OUR_NAMES.get(part, part) if part.startswith('mlp') else part}.{leaf}"
    return f"{OUR_NAMES.get(stem, stem)}.{leaf}"


@pytest.mark.parametrize(("name", "size"), [(BD3, 4), (MDLM, LENGTH)])
def test_the_reference_takes_the_same_step(name: str, size: int) -> None:
    """One loss and one gradient of all weights, from the same weights and the same noise."""
    torch.manual_seed(0)
    model, reference = DiT(NET), Reference(VOCAB, 16, 3, 2, 8, 0.0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3)
    weights = {our_name(key): value for key, value in reference.state_dict().items()}
    model.load_state_dict(weights)
    x0, slots = torch.randint(0, VOCAB - 1, (3, LENGTH)), np.arange(3)
    u, draws = stratified_times(1, 0, slots, 3, LENGTH // size), mask_draws(1, 0, slots, LENGTH)
    noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0))
    ours = training_loss(name, as_denoiser(model, size), x0, noise, VOCAB - 1).loss

    rate = noise.rate.repeat_interleave(size, dim=1)
    x_t, _ = corrupt(x0, rate, noise.draws, VOCAB - 1)
    both = torch.cat([x_t, x0], dim=1) if size < LENGTH else x_t
    logits = reference(both, LENGTH, dense_mask(LENGTH, size) if size < LENGTH else None)
    weight = noise.loss_weight.repeat_interleave(size, dim=1)
    theirs = (negative_log_likelihood(logits, x_t, x0, VOCAB - 1) * weight).sum() / (3 * (LENGTH - 1))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    for key, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(our_name(key)).grad, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "size", "views"), [(BD3, 4, 1), (BD3, 4, 3), (BD3, 1, 1), (MDLM, 16, 1), (AR, 1, 1)])
def test_the_floor_counts_what_the_meter_counts(name: str, size: int, views: int) -> None:
    """Two countings of one step: by products, and by the closed form; the head's tokens are whole ones."""
    net = DiTConfig(VOCAB, 16, 3, 2, 4, 8, name == AR)
    counted = costs.products(net, name, LENGTH, size, 8, 0.5, views)
    expected = 8 * training_flops_per_sequence(net, name, LENGTH, size, 0.5, views)
    assert sum(3 * product.flops for product in counted) == pytest.approx(expected, rel=1e-9)


def test_upstreams_time_is_its_own_at_its_own_rates() -> None:
    """And half of it where everything is twice as fast."""
    rates = upstream.CEILINGS["fp32"]
    assert upstream.scaled_seconds("b", "bd3", "fp32", rates) == pytest.approx(19.7)
    assert upstream.scaled_seconds("b", "bd3", "fp32", {k: 2 * v for k, v in rates.items()}) == pytest.approx(19.7 / 2)
