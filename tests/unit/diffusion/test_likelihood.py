"""The bound against brute force, closed forms and itself."""

import itertools
import math

import numpy as np
import pytest
import torch

from bd3_ds.config.schema import AR, BD3, MDLM, WeightConfig
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.bounds import bound_under
from bd3_ds.diffusion.likelihood import Texts
from bd3_ds.diffusion.noise import make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.diffusion.score_entropy_bound import score_entropy_bound
from bd3_ds.evaluation.denoisers import conditioned, scored_network
from bd3_ds.model.build import initialise
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from bd3_ds.model.kv_cache import KVCache
from tests.helpers.schedules import schedule_config

VOCAB, MASK = 11, 10


@pytest.fixture(scope="module")
def model():
    """A network with random weights everywhere, so that nothing cancels."""
    net = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, False, attention="dense")).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.4)
    return net


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, MASK, (3, 16), generator=torch.Generator().manual_seed(1))


def brute_force(model, x0, size):
    """Sum over blocks and over all subsets, one network pass each, straight from the definition."""
    total = torch.zeros(len(x0), dtype=torch.float64)
    for block in range(x0.shape[1] // size):
        places = [i for i in range(block * size, (block + 1) * size) if i > 0]
        for m in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, m):
                x_t = x0.clone()
                x_t[:, list(chosen)] = MASK
                logits = model(x_t, x0, block_size=size)
                logits[..., MASK] = -torch.inf
                cost = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0][:, list(chosen)].sum(1)
                total += cost / m / math.comb(len(places), m)
    return total


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4])
def test_exact_is_brute_force(model, text, size):
    bound = likelihood.exact(conditioned(model, size), Texts(text), size, MASK, at_once=7)
    torch.testing.assert_close(bound.nelbo.sum(1), brute_force(model, text, size), rtol=1e-5, atol=1e-5)
    assert bound.stderr.max() == 0


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("estimator", [likelihood.stratified, likelihood.monte_carlo])
def test_sampled_estimators_agree_with_exact(model, text, size, estimator):
    truth = likelihood.exact(conditioned(model, size), Texts(text), size, MASK).nelbo.sum()
    bound = estimator(conditioned(model, size), Texts(text), size, MASK, views=400, seed=3)
    error = bound.variance.sum().sqrt()
    assert abs(bound.nelbo.sum() - truth) < 4 * error + 2e-3 * truth  # mc leaves out rates below 1e-3
    assert error < 0.05 * truth


@torch.no_grad()
def test_stratified_has_the_smaller_error(model, text):
    stratified = likelihood.stratified(conditioned(model, 8), Texts(text), 8, MASK, views=64, seed=0)
    mc = likelihood.monte_carlo(conditioned(model, 8), Texts(text), 8, MASK, views=64, seed=0)
    assert stratified.variance.sum() < 0.5 * mc.variance.sum()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_uniform_denoiser_gives_log_v(size, text):
    def uniform(x0):
        return lambda x_t, at, read: read.of_logits(torch.zeros(len(at), VOCAB))

    scored = text.shape[0] * (text.shape[1] - 1)
    values = [likelihood.stratified(uniform, Texts(text), size, MASK, views=3, seed=0).nelbo.sum()]
    if size <= 8:
        values.append(likelihood.exact(uniform, Texts(text), size, MASK).nelbo.sum())
    for value in values:
        assert value.item() / scored == pytest.approx(math.log(VOCAB - 1), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4, 16])
def test_perfect_denoiser_gives_zero(size, text):
    def perfect(x0):
        def denoise(x_t, at, read):
            truth = x0[:, None].expand_as(x_t).flatten()[at]
            return read.of_logits(torch.nn.functional.one_hot(truth, VOCAB) * 1e4)

        return denoise

    for estimator in (likelihood.stratified, likelihood.monte_carlo):
        assert estimator(perfect, Texts(text), size, MASK, views=2, seed=0).nelbo.sum() == 0


@torch.no_grad()
def test_two_passes_equal_one(model, text):
    """The training pass (noisy beside clean) and the cached pass (clean first) are the same function."""
    x_t = torch.where(torch.rand(text.shape, generator=torch.Generator().manual_seed(2)) < 0.5, MASK, text)
    for size in (1, 2, 4, 8, 16):
        together = model(x_t, text, block_size=size)
        apart = conditioned(model, size)(text)(x_t[:, None], torch.arange(x_t.numel()), None)
        torch.testing.assert_close(apart.view_as(together), together, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_block_size_one_is_autoregression_by_the_same_network(model, text):
    """Each token from a mask behind its clean prefix, one pass a token, as sampling would see it."""
    bound = likelihood.exact(conditioned(model, 1), Texts(text), 1, MASK)
    cache = KVCache(2)
    mask = torch.full((len(text), 1), MASK)
    for i in range(1, text.shape[1]):
        model.encode(text[:, i - 1 : i], cache, block_size=1)
        logits = model.decode(mask, cache, start=i, block_size=1)[:, 0]
        logits[:, MASK] = -torch.inf
        expected = -logits.log_softmax(-1).gather(-1, text[:, i : i + 1])[:, 0]
        torch.testing.assert_close(bound.nelbo[:, i], expected, rtol=1e-5, atol=1e-5)
    assert bound.tokens == 3 * 15 and bound.forwards == 3 * 2 and bound.total == float(bound.nelbo.sum())


@torch.no_grad()
def test_one_block_is_mdlm(model, text):
    """The same noise costs the same; what BD3 is given of the clean text makes no difference in a single block."""
    u, draws = stratified_times(5, 0, np.arange(3), 3, 1), mask_draws(5, 0, np.arange(3), 16)
    noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0))
    losses = [training_loss(name, as_denoiser(model, 16), text, noise, MASK) for name in (BD3, MDLM)]
    assert torch.equal(losses[0].loss, losses[1].loss) and torch.equal(losses[0].nelbo, losses[1].nelbo)
    without = conditioned(model, 16)(torch.zeros_like(text))  # sees no clean token whatever it is given
    x_t = torch.where(draws < 0.5, MASK, text)[:, None]
    everywhere = torch.arange(x_t.numel())
    torch.testing.assert_close(without(x_t, everywhere, None), conditioned(model, 16)(text)(x_t, everywhere, None))


def autoregressive(net, texts):
    return bound_under(AR, scored_network(net, 1, texts.documents), texts, 1, MASK, likelihood.Estimator("exact"))


@torch.no_grad()
def test_autoregressive_is_the_chain_rule(text):
    net = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, True, attention="sdpa")).eval()
    initialise(net, 0)
    torch.nn.init.normal_(net.head.linear.weight)
    bound = autoregressive(net, Texts(text))
    for i in range(1, text.shape[1]):
        logits = net(text[:, :i], block_size=1)[:, -1]
        logits[:, MASK] = -torch.inf
        expected = -logits.log_softmax(-1).gather(-1, text[:, i : i + 1])[:, 0]
        torch.testing.assert_close(bound.nelbo[:, i], expected, rtol=1e-4, atol=1e-5)


# A part of a text of 8 tokens: which are scored (s), given (g) and hidden (h).
PARTS = ["ggggggss", "gggssshh", "gsgsgggg", "gggggshs", "gggsgssh", "ggssgghh"]


def part_of(text, part):
    """Two rows of 8 tokens with hidden ones masked, and where they are scored."""
    x0 = text[:2, :8].clone()
    x0[:, [place == "h" for place in part]] = MASK
    return x0, torch.tensor([place == "s" for place in part]).expand(2, -1)


def by_order(model, x0, part, size):
    """What each order of writing a block's scored tokens pays in nats [b, orders], by one network pass a token."""
    blocks = []
    for block in range(len(part) // size):
        places = [i for i in range(block * size, (block + 1) * size) if part[i] == "s"]
        orders = []
        for order in itertools.permutations(places):
            paid, x_t = torch.zeros(len(x0), dtype=torch.float64), x0.clone()
            x_t[:, places] = MASK
            for place in order:
                logits = model(x_t, x0, block_size=size)[:, place]
                logits[:, MASK] = -torch.inf
                paid += -logits.log_softmax(-1).gather(-1, x0[:, place, None])[:, 0]
                x_t[:, place] = x0[:, place]
            orders.append(paid)
        blocks.append(torch.stack(orders, 1))
    return blocks


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "stripes"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_pays_the_mean_over_all_orders(model, text, backend, size, part):
    net = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, False, attention=backend)).double().eval()
    net.load_state_dict(model.state_dict())
    x0, scored = part_of(text, part)
    bound = likelihood.exact(conditioned(net, size), Texts(x0, scored=scored), size, MASK, at_once=5)
    expected = sum(orders.mean(1) for orders in by_order(net, x0, part, size))
    torch.testing.assert_close(bound.nelbo.sum(1), expected, rtol=1e-5, atol=1e-5)
    assert bound.tokens == 2 * part.count("s") and bound.nelbo[~scored].abs().max() == 0
    most = max(part[i : i + size].count("s") for i in range(0, 8, size))
    assert bound.forwards == 2 * (2**most - 1) + 2 * (size < 8)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bounds_of_all_continuations_add_up_to_one_at_most(model, text, size):
    """At block size 1 exactly; in larger blocks exp(-bound) is at most the probability, which itself adds up to 1."""
    x0 = text[:1, :8].repeat(100, 1)
    x0[:, 5], x0[:, 6], x0[:, 7] = torch.arange(100) // 10, torch.arange(100) % 10, MASK
    part = "gggggssh"
    scored = torch.tensor([place == "s" for place in part]).expand(100, -1)
    bound = likelihood.exact(conditioned(model, size), Texts(x0, scored=scored), size, MASK).nelbo.sum(1)
    probability = math.prod((-orders).exp().mean(1) for orders in by_order(model, x0, part, size))
    assert probability.sum().item() == pytest.approx(1, abs=1e-6)
    assert bool(((-bound).exp() <= probability * (1 + 1e-5)).all())
    if size <= 2:  # one token a block
        torch.testing.assert_close((-bound).exp(), probability, rtol=1e-5, atol=1e-9)
    else:
        assert 0.3 < (-bound).exp().sum() < 0.999


@torch.no_grad()
@pytest.mark.parametrize("estimator", [likelihood.stratified, likelihood.monte_carlo])
@pytest.mark.parametrize("part", PARTS)
def test_sampled_estimators_score_parts(model, text, estimator, part):
    x0, scored = part_of(text, part)
    truth = likelihood.exact(conditioned(model, 8), Texts(x0, scored=scored), 8, MASK).nelbo.sum(1)
    bound = estimator(conditioned(model, 8), Texts(x0, scored=scored), 8, MASK, views=400, seed=3)
    assert bool(((bound.nelbo.sum(1) - truth).abs() < 4 * bound.stderr + 3e-3 * truth).all())
    assert bound.nelbo[~scored].abs().max() == 0 and bound.tokens == int(scored.sum())


@torch.no_grad()
def test_scoring_all_places_is_scoring_none_in_particular(model, text):
    everywhere = torch.ones_like(text, dtype=torch.bool)  # position 0 is left out all the same
    for size in (1, 4):
        plain = likelihood.exact(conditioned(model, size), Texts(text), size, MASK)
        assert torch.equal(
            plain.nelbo, likelihood.exact(conditioned(model, size), Texts(text, scored=everywhere), size, MASK).nelbo
        )
    for estimator in (likelihood.stratified, likelihood.monte_carlo):
        plain = estimator(conditioned(model, 8), Texts(text), 8, MASK, views=3, seed=5)
        assert torch.equal(
            plain.nelbo, estimator(conditioned(model, 8), Texts(text, scored=everywhere), 8, MASK, 3, 5).nelbo
        )


def score_network(seed=0):
    """A SEDD network with random weights, as `score_entropy_bound` wants it."""
    net = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, False, attention="dense")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return lambda x_t, sigma, at, read: net(x_t, block_size=x_t.shape[1], sigma=sigma, at=at, read=read)


@torch.no_grad()
def test_sedd_scores_parts(text):
    network = score_network()
    plain = score_entropy_bound(network, Texts(text), MASK, views=4, seed=1)
    everywhere = torch.ones_like(text, dtype=torch.bool)
    assert torch.equal(plain.nelbo, score_entropy_bound(network, Texts(text, scored=everywhere), MASK, 4, 1).nelbo)
    # All continuations of one token, the last known one: their probabilities are at least exp(-bound).
    x0 = text[:1, :8].repeat(10, 1)
    x0[:, 5], x0[:, 6:] = torch.arange(10), MASK
    scored = torch.zeros_like(x0, dtype=torch.bool)
    scored[:, 5] = True
    bound = score_entropy_bound(network, Texts(x0, scored=scored), MASK, views=2000, seed=1)
    total = (-bound.nelbo.sum(1)).exp()
    error = (total * bound.stderr).square().sum().sqrt()
    assert total.sum() < 1 + 3 * error + 0.02 and error < 0.05
    assert bound.nelbo[~scored].abs().max() == 0 and bound.tokens == 10


@torch.no_grad()
def test_autoregressive_scores_parts(text):
    net = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, True, attention="sdpa")).eval()
    initialise(net, 0)
    torch.nn.init.normal_(net.head.linear.weight)
    whole = autoregressive(net, Texts(text)).nelbo
    scored = torch.rand(text.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    bound = autoregressive(net, Texts(text, scored=scored))
    scored[:, 0] = False
    torch.testing.assert_close(bound.nelbo, whole * scored)
    assert bound.tokens == int(scored.sum())
    documents = torch.where(torch.arange(16) < 12, 0, -1).expand(3, -1)
    padded = autoregressive(net, Texts(text, documents, scored))
    torch.testing.assert_close(padded.nelbo[:, :12], bound.nelbo[:, :12], rtol=1e-5, atol=1e-5)
