"""Samplers against the distributions that they claim to draw from, with and without their cache."""

import itertools
import math

import pytest
import torch

from bd3_ds.diffusion.score_entropy import sigma_of
from bd3_ds.diffusion.subs import subs_log_probs
from bd3_ds.model.dit import DiT, DiTConfig
from bd3_ds.sampling.denoiser import RecomputingDenoiser
from bd3_ds.sampling.draw import draw as token_draw
from bd3_ds.sampling.draw import draw_tokens, token_weights
from bd3_ds.sampling.options import Options, WindowPlan
from bd3_ds.sampling.sampler import denoiser_of, sample
from bd3_ds.sampling.stopping import find_ends, low_entropy, unigram_entropy

VOCAB, MASK, BOS = 5, 4, 0
LENGTH = 4
TEXTS = torch.tensor(list(itertools.product(range(MASK), repeat=LENGTH - 1)))  # [64, 3]


def network(causal=False, vocab=VOCAB, kind=DiT, seed=3, scales=(3.0, 0.4, 0.3)):
    """Random weights everywhere, of these scales in embedding, layers and head: neither uniform nor certain."""
    model = kind(DiTConfig(vocab, 16, 2, 2, 2, 8, causal)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = {"embed": scales[0], "head": scales[2]}.get(name.partition(".")[0], scales[1])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def draw(model, num=3, length=12, block_size=4, prompt=(BOS,), seed=7, window=None, overlap=None, denoiser=None, **how):
    """Samples of a network with [MASK] as its last token; a window (default: whole blocks) of one block is MDLM's."""
    block_size = 1 if model.network.causal else block_size
    window = window or -(-length // block_size) * block_size
    whole = block_size == window
    step = 1 if whole else block_size
    plan = WindowPlan(length, block_size, window, overlap or window // 2 // step * step, whole)
    more = {name: how.pop(name) for name in ("first_row", "timed", "eos_id", "progress") if name in how}
    return sample(
        denoiser or denoiser_of(model, block_size),
        plan,
        torch.as_tensor(prompt),
        num=num,
        mask_id=model.network.vocab_size - 1,
        options=Options(**how),
        seed=seed,
        **more,
    )


def assert_drawn_from(tokens, expected):
    """A chi-square test of tokens [N, 4] against probabilities [64] of the texts behind BOS."""
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0, dtype=torch.float64))
    index = (tokens[:, 1:] * torch.tensor([MASK**2, MASK, 1])).sum(1)
    counts = torch.bincount(index, minlength=len(TEXTS)).double()
    wanted = expected * len(tokens)
    # Cells that expect few are put together, as the test's approximation asks for.
    small = wanted < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    wanted = torch.cat([wanted[~small], wanted[small].sum()[None].clamp(min=1e-9)])
    freedom = len(wanted) - 1
    assert freedom >= 10
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@torch.no_grad()
def masked_probability(model, text, hidden, place, block_size, sigma=None):
    """p(token at `place`) of clean texts [N, 4] with `hidden` places masked, one pass each, no cache: [N] fp64."""
    x_t = text.clone()
    x_t[:, hidden] = MASK
    logits = model(x_t, text, block_size=block_size, sigma=sigma)[:, place]
    return subs_log_probs(logits, MASK).double().gather(-1, text[:, place : place + 1])[:, 0].exp()


def test_block_diffusion_averages_over_the_orders_of_a_block():
    model = network(seed=17, scales=(1.0, 0.5, 0.4))  # the order of unmasking matters much to what comes out
    text = torch.cat([torch.full((64, 1), BOS), TEXTS], dim=1)
    first = masked_probability(model, text, [1], 1, 2)
    forward = masked_probability(model, text, [2, 3], 2, 2) * masked_probability(model, text, [3], 3, 2)
    backward = masked_probability(model, text, [2, 3], 3, 2) * masked_probability(model, text, [2], 2, 2)
    tokens = draw(model, 4000, LENGTH, 2).tokens
    assert_drawn_from(tokens, first * (forward + backward) / 2)
    with pytest.raises(AssertionError):  # the test can tell one order from the average of both
        assert_drawn_from(tokens, first * forward)


def test_one_block_averages_over_all_orders():
    model = network()
    text = torch.cat([torch.full((64, 1), BOS), TEXTS], dim=1)
    expected = torch.zeros(64, dtype=torch.float64)
    for order in itertools.permutations([1, 2, 3]):
        probability = torch.ones(64, dtype=torch.float64)
        for step, place in enumerate(order):
            probability *= masked_probability(model, text, list(order[step:]), place, LENGTH)
        expected += probability / 6
    assert_drawn_from(draw(model, 4000, LENGTH, LENGTH).tokens, expected)


def test_sedd_is_conditioned_on_the_time_of_each_step():
    """Texts of two free tokens: the orders averaged, and the times integrated over the midpoints of a grid."""
    model = network()
    prompt = [BOS, 1]
    points = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    u1, u2 = torch.meshgrid(points, points, indexing="ij")
    early = u1.sqrt().flatten()
    late = early * u2.flatten()
    expected = torch.zeros(64, dtype=torch.float64)
    for a, b in itertools.product(range(MASK), repeat=2):
        text = torch.tensor([[*prompt, a, b]]).expand(len(early), -1)

        def probability(hidden, place, t, text=text):
            return masked_probability(model, text, hidden, place, LENGTH, sigma_of(t))

        forward = probability([2, 3], 2, early) * probability([3], 3, late)
        backward = probability([2, 3], 3, early) * probability([2], 2, late)
        expected[MASK**2 + MASK * a + b] = ((forward + backward) / 2).mean()
    tokens = draw(model, 4000, LENGTH, LENGTH, prompt, timed=True).tokens
    counts = torch.bincount((tokens[:, 1:] * torch.tensor([16, 4, 1])).sum(1), minlength=64).double()
    wanted = 4000 * expected
    cells = wanted > 5
    assert counts.sum() == counts[16:32].sum() and cells.sum() > 6
    statistic = ((counts - wanted)[cells] ** 2 / wanted[cells]).sum()
    assert statistic < cells.sum() + 4 * math.sqrt(2 * cells.sum())


def test_autoregressive_is_the_chain_rule():
    model = network(causal=True)
    text = torch.cat([torch.full((64, 1), BOS), TEXTS], dim=1)
    with torch.no_grad():
        log_p = subs_log_probs(model(text, block_size=1), MASK).double()
    expected = log_p[:, :-1].gather(-1, text[:, 1:, None])[..., 0].sum(1).exp()
    assert_drawn_from(draw(model, 4000, LENGTH).tokens, expected)


class TrainingPasses(RecomputingDenoiser):
    """No cache: each evaluation is a training pass over the text so far, the noisy stream beside the clean one."""

    def predict(self, block, at, sigma, read):
        text = block if self.clean is None else torch.cat([self.clean, block], dim=1)
        if self.model.network.causal:
            logits = self.model(text, block_size=1)[:, len(self) - 1 : -1]
        else:
            logits = self.model(text, text, block_size=self.block_size, sigma=sigma)[:, len(self) :]
        self.logits.append(logits.flatten(0, 1)[at])
        return read(self.logits[-1], 0)


class Heard:
    """A denoiser that keeps the logits that it read."""

    def __init__(self, denoiser):
        self.denoiser, self.logits = denoiser, []

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def __len__(self):
        return len(self.denoiser)

    def predict(self, block, at, sigma, read):
        def hear(logits, first):
            self.logits.append(logits)
            return read(logits, first)

        return self.denoiser.predict(block, at, sigma, hear)


ORDERS = [{}, {"steps": 3}, {"threshold": 0.2}, {"entropy_bound": 1.5}, {"tokens_per_step": 2}]


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("block_size, window", [(1, 6), (2, 12), (4, 8), (12, 12), (6, 6), (0, 12), (0, 5)])
def test_the_cache_changes_nothing(block_size, window, how):
    """Logits of every evaluation, where rows have prompts of odd lengths and end at different times; windows slide."""
    causal, size = block_size == 0, max(1, block_size)
    if causal and how:
        pytest.skip("a causal network has one order")
    model = network(causal, 11, seed=5)
    heard = [Heard(denoiser_of(model, size)), Heard(RecomputingDenoiser(model, size)), TrainingPasses(model, size)]
    heard[2].logits = []
    prompt = torch.tensor([[BOS, 3, 5, 2, 8], [BOS, 3, 10, 10, 10], [BOS, 10, 10, 10, 10]]).repeat(3, 1)
    cached, recomputed, trained = (
        draw(model, 9, 15, size, prompt, window=window, denoiser=one, eos_id=1, stop=("eos",), **how) for one in heard
    )
    assert (cached.tokens == 10).sum() == 0 and len(set(cached.lengths.tolist())) > 2
    for one, samples in ((1, recomputed), (2, trained)):
        assert torch.equal(cached.tokens, samples.tokens) and torch.equal(cached.nfe, samples.nfe)
        for ours, theirs in zip(heard[0].logits, heard[one].logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("causal, block_size", [(False, 1), (False, 4), (False, 12), (True, 1)])
def test_given_tokens_stay(causal, block_size):
    """Rows whose prompts differ in length, with a hole in one."""
    model = network(causal, 11)
    prompt = torch.tensor([[0, 3, 5, 2, 8, 1], [0, 3, 10, 10, 10, 10], [0, 3, 10, 2, 10, 1]])
    samples = draw(model, prompt=prompt, block_size=block_size)
    given = prompt != 10
    assert torch.equal(samples.tokens[:, :6][given], prompt[given])
    assert not (samples.tokens == 10).any()
    assert samples.nfe.tolist() == [6, 10, 8]
    for row in range(3):
        alone = draw(model, num=1, prompt=prompt[row], block_size=block_size, first_row=row)
        assert torch.equal(alone.tokens[0], samples.tokens[row])


@pytest.mark.parametrize("causal", [False, True])
def test_a_text_depends_on_seed_and_row_alone(causal):
    model = network(causal, 11)
    together = draw(model, num=5).tokens
    assert torch.equal(together, torch.cat([draw(model, num=2).tokens, draw(model, num=3, first_row=2).tokens]))
    assert torch.equal(together[:, :8], draw(model, num=5, length=8).tokens)
    assert not torch.equal(together, draw(model, num=5, seed=8).tokens)
    assert len({tuple(row) for row in together.tolist()}) == 5


@pytest.mark.parametrize(
    "block_size, length, nfe, writes", [(1, 12, 11, 11), (4, 12, 11, 2), (12, 12, 11, 0), (4, 10, 11, 2)]
)
def test_counts(block_size, length, nfe, writes):
    told = []
    samples = draw(network(), length=length, block_size=block_size, progress=told.append)
    assert samples.tokens.shape == (3, length)
    assert samples.nfe.tolist() == [nfe] * 3 and sum(told) == 3 * nfe
    assert samples.cache_forwards.tolist() == [writes] * 3
    assert samples.order[:, 0].tolist() == [0] * 3
    for row in samples.order[:, 1:].tolist():
        assert len(set(row)) == length - 1 and set(row) <= set(range(1, nfe + 1))
    assert samples.probability[:, 0].isnan().all() and (samples.probability[:, 1:] > 0).all()


def test_a_length_inside_a_block_is_cut_from_the_whole():
    model = network(vocab=11)
    assert torch.equal(draw(model, length=10).tokens, draw(model, length=12).tokens[:, :10])


def test_an_end_behind_the_length_is_none():
    samples = draw(network(), 200, length=10, eos_id=1, stop=("eos",))
    last = samples.tokens.gather(1, samples.lengths[:, None] - 1)[:, 0]
    assert torch.equal(samples.ended == 1, last == 1) and set(samples.lengths.tolist()) >= {2, 9, 10}
    assert (samples.lengths == 10).sum() > 0 and (last[samples.lengths < 10] == 1).all()


def test_a_long_prompt_is_cached_in_one_pass():
    # 8 given tokens at once, then one block
    assert draw(network(), prompt=[0] * 9, block_size=2).cache_forwards.tolist() == [2] * 3


LOG_P = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    "how, wanted",
    [
        ({}, [0.5, 0.3, 0.15, 0.05, 0]),
        ({"nucleus": 0.5}, [1, 0, 0, 0, 0]),
        ({"nucleus": 0.6}, [0.625, 0.375, 0, 0, 0]),  # the token that crosses 0.6 is in
        ({"nucleus": 1e-6}, [1, 0, 0, 0, 0]),
        ({"nucleus": 1.0}, [0.5, 0.3, 0.15, 0.05, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.3, 0.15, 0.05, 0]),
        ({"nucleus": 0.52}, [0.625, 0.375, 0, 0, 0]),
        ({"top_k": 3, "nucleus": 0.52}, [1, 0, 0, 0, 0]),  # 0.52 of the 0.95 that top_k leaves
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365, 0]),
        ({"repetition_penalty": 2.0}, [0.25 / 0.675, 0.3 / 0.675, 0.075 / 0.675, 0.05 / 0.675, 0]),
        ({"repetition_penalty": 2.0, "temperature": 0}, [0, 1, 0, 0, 0]),
    ],
)
def test_what_tokens_are_drawn_from(how, wanted):
    weights = token_weights(LOG_P, Options(**how), seen=torch.tensor([[0, 2, 0, MASK]]))
    assert (weights / weights.sum())[0].tolist() == pytest.approx(wanted)


def test_extreme_numbers_never_draw_what_has_no_probability():
    probabilities = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]], dtype=torch.float64).expand(3, -1)
    assert draw_tokens(
        probabilities.cumsum(-1), torch.tensor([0.0, 0.7 + 1e-12, 1 - 2**-53], dtype=torch.float64)
    ).tolist() == [
        1,
        3,
        3,
    ]


def test_rare_tokens_are_drawn():
    """A token of probability 2e-9 has its share of the uniform numbers, which fp32 numbers could not give it."""
    logits = torch.tensor([[0.0, math.log(2e-9), 5.0]]).repeat(3, 1)
    drawn = token_draw(logits, torch.tensor([0.5, 1 - 1e-9, 1 - 3e-9], dtype=torch.float64), 2, Options())
    assert drawn.tokens.tolist() == [0, 1, 0]
    assert drawn.probability.tolist() == pytest.approx([1, 2e-9, 1]) and drawn.confidence.tolist() == pytest.approx(
        [1] * 3
    )


def test_where_a_text_ends():
    tokens = torch.tensor([[0, 5, 6, 0, 7, 0]]).expand(3, -1)
    lengths, why = find_ends(tokens, torch.tensor([1, 4, 6]), ("eos",), 0)
    assert lengths.tolist() == [4, 6, 6] and why.tolist() == [1, 1, 0]
    assert find_ends(tokens, torch.tensor([1, 4, 6]), ("eos",), 9)[1].tolist() == [0, 0, 0]
    dull = torch.cat([torch.arange(300), torch.arange(256) % 2])[None]
    lengths, why = find_ends(dull, torch.tensor([5]), ("entropy", "eos"), 999)
    assert (lengths.item(), why.item()) == (300, 2)
    assert find_ends(dull, torch.tensor([310]), ("entropy",), None)[0].tolist() == [310]


def test_entropy_of_repetition():
    rows = torch.stack([torch.arange(256), torch.arange(256) % 2, torch.zeros(256, dtype=torch.long)])
    assert unigram_entropy(rows).tolist() == pytest.approx([math.log(256), math.log(2), 0.0])
    assert low_entropy(rows).tolist() == [False, True, True]
    assert low_entropy(rows[:, :255]).tolist() == [False] * 3
