"""Parity with the upstream code: given its weights, our logits, losses and gradients are its own."""

import json

import numpy as np
import pytest
import torch

from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.diffusion.noise import Noise
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.score_entropy import ScoreNats
from bd3_ds.diffusion.subs import subs_log_probs, subs_nll
from bd3_ds.interop.bd3lms import our_name, rename_upstream, upstream_objective
from bd3_ds.model.attention.masks import CLEAN, may_attend, places
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.model.rope import rotary_angles, rotate
from bd3_ds.sampling.denoiser import CachedDenoiser, RecomputingDenoiser
from bd3_ds.sampling.draw import draw
from bd3_ds.sampling.options import Options

MASK = 100
CPU = torch.device("cpu")


def close(ours, reference, atol):
    torch.testing.assert_close(ours.detach(), torch.as_tensor(reference), atol=atol, rtol=1e-5)


@pytest.fixture(scope="module")
def golden(shared):
    def read(name):
        return {key: torch.from_numpy(value) for key, value in np.load(shared / "golden" / f"{name}.npz").items()}

    return read


def network(golden, causal, backend="dense"):
    model = DiT(DiTConfig(101, 64, 2, 2, 4, 32, causal, attention=backend))
    model.load_state_dict(rename_upstream(golden("state_dict_causal" if causal else "state_dict_adaln")))
    return model


@pytest.mark.parametrize("backend", ["dense", "sdpa", "stripes"])
@pytest.mark.parametrize("case, block", [("bd3lm_b4", 4), ("bd3lm_b1_nll", 1), ("mdlm", 32), ("sedd", 32), ("ar", 1)])
def test_logits(golden, case, block, backend):
    data = golden(case)
    model = network(golden, case == "ar", backend)
    if case == "ar":
        logits = model(data["input_tokens"], block_size=1)
    else:
        sigma = data["sigma_to_backbone"] if case == "sedd" else None
        logits = model(data["xt"], data["x0"], block_size=block, sigma=sigma)
    close(logits, data["logits"], 1e-5)


@pytest.mark.parametrize("case, block", [("bd3lm_b4", 4), ("bd3lm_b1_nll", 1), ("mdlm", 32)])
def test_losses_of_masked_diffusion(golden, case, block):
    data = golden(case)
    at = data["xt"] == MASK
    flat = at.flatten().nonzero()[:, 0]
    logits = network(golden, False)(data["xt"], data["x0"], block_size=block, at=flat)
    nats = subs_nll(logits, data["x0"][at], MASK)
    loss = torch.zeros(data["x0"].shape)
    loss[at] = nats * -data["loss_scale"].expand_as(data["x0"])[at]
    close(loss, data["loss"], 1e-4)
    everywhere = subs_log_probs(network(golden, False)(data["xt"], data["x0"], block_size=block), MASK)
    close(everywhere[at].clamp(min=-1e5), data["model_output"][at].clamp(min=-1e5), 1e-5)


def test_loss_of_sedd(golden):
    data = golden("sedd")
    at = data["xt"] == MASK
    read = ScoreNats(data["x0"][at], MASK, sigma=data["sigma"].expand_as(data["x0"])[at])
    model, inputs = network(golden, False), {"block_size": 32, "sigma": data["sigma_to_backbone"]}
    inputs["at"] = at.flatten().nonzero()[:, 0]
    for nats in (read.of_logits(model(data["xt"], **inputs))[1], model(data["xt"], **inputs, read=read)[1]):
        loss = torch.zeros(data["x0"].shape)
        loss[at] = nats.detach() * -data["loss_scale"].expand_as(data["x0"])[at]
        close(loss, data["loss"], 1e-4)


def test_loss_of_ar(golden):
    data = golden("ar")
    logits = network(golden, True)(data["input_tokens"], block_size=1)
    loss = subs_nll(logits.flatten(0, 1), data["output_tokens"].flatten(), MASK).view(3, 31)
    close(loss, data["loss"], 1e-4)


def as_noise(data, blocks):
    """Upstream's rates, weights and masks (log-linear time) as our objective takes them."""
    t = data["t"].expand(3, 32).double()[:, :: 32 // blocks]
    draws = torch.where(data["xt"] == MASK, 0.0, 2.0).double()
    return Noise(t, 1 / t, 1 / t, None, draws)


@pytest.mark.parametrize(
    "case, name, block, causal",
    [("bd3lm_b4", BD3, 4, False), ("mdlm", MDLM, 32, False), ("sedd", SEDD, 32, False), ("ar", AR, 1, True)],
)
def test_objective_and_gradients(golden, case, name, block, causal):
    data = golden(case)
    model = network(golden, causal)

    noise = None if causal else as_noise(data, 32 // block)
    ours = training_loss(name, as_denoiser(model, block), data["x0"], noise, MASK)
    scored = 3 * 31
    close(ours.loss, data["loss"].sum() / scored, 1e-4)
    if case in ("ar", "bd3lm_b4"):
        # Upstream divides by every token it was given, the unscored first one included.
        (ours.loss * scored / data["loss"].numel()).backward()
        for key, reference in golden(f"grads_{case}").items():
            name = our_name(key)
            if name is not None:
                close(model.get_parameter(name).grad, reference, 1e-4)


def test_sampling_logits_with_and_without_cache(golden):
    data = golden("bd3lm_sample_b4")
    model = network(golden, False)
    for blocks in (1, 3, 8):
        x = data[f"nb{blocks}.x"]
        last = (blocks - 1) * 4
        cache = KVCache(2)
        if last:
            model.encode(x[:, :last], cache, block_size=4)
        cached = model.decode(x[:, last:], cache, start=last, block_size=4)
        close(cached, data[f"nb{blocks}.logits_kv"], 1e-5)
        close(cached, data[f"nb{blocks}.logits"][:, last:], 1e-5)


def test_a_step_of_the_sampler(golden):
    """What our sampler draws from at the masked places of upstream's blocks, and the probabilities that it notes."""
    data = golden("bd3lm_sample_b4")
    model = network(golden, False)
    for blocks in (1, 3, 8):
        x, log_p = data[f"nb{blocks}.x"], data[f"nb{blocks}.log_p"]
        for denoiser in (CachedDenoiser(model, 4), RecomputingDenoiser(model, 4)):
            block = x[:, -4:]
            if blocks > 1:
                denoiser.extend(x[:, :-4])
            at = (block == MASK).flatten().nonzero()[:, 0]
            assert len(at)

            def read(logits, _first):
                return draw(logits, torch.linspace(0, 0.99, len(logits), dtype=torch.float64), MASK, Options())

            with torch.no_grad():
                drawn = denoiser.predict(block, at, None, read)
            theirs = log_p[:, -4:].flatten(0, 1)[at]
            close(drawn.probability.log().float(), theirs.gather(1, drawn.tokens[:, None])[:, 0], 1e-5)
            close(drawn.confidence.log().float(), theirs[:, :MASK].max(-1).values, 1e-5)
            entropy = torch.special.entr(theirs[:, :MASK].double().exp()).sum(-1)
            close(drawn.entropy.float(), entropy.float(), 1e-5)


@pytest.mark.parametrize("length, block", [(8, 2), (8, 4), (12, 4), (8, 8), (6, 1)])
def test_block_diffusion_mask(golden, length, block):
    packed = places(0, 0, length, block, CPU) + places(CLEAN, 0, length, block, CPU)
    assert torch.equal(may_attend(packed, packed), golden("primitives")[f"block_diff_mask_n{length}_b{block}"])


def test_rotary_and_time_embedding(golden):
    data = golden("primitives")
    cos, sin = rotary_angles(torch.arange(16), 32, 10_000.0)
    turned = rotate(data["rotary_qkv_in"].permute(2, 0, 3, 1, 4), cos, sin).permute(1, 3, 0, 2, 4)
    close(turned[:, :, :2], data["rotary_qkv_out"][:, :, :2], 1e-6)


def test_objective_follows_from_the_configuration(shared):
    for case, expected in (("ar", AR), ("sedd", SEDD), ("mdlm", MDLM), ("bd3lm_b4", BD3)):
        config = json.loads((shared / "golden" / f"{case}.json").read_text())
        flags = {
            "causal": config["causal"],
            **{k: config["algo"][k] for k in ("cross_attn", "time_conditioning") if k in config["algo"]},
        }
        assert upstream_objective(flags) == expected
