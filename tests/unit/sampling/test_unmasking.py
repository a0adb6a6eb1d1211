"""Every order of unmasking against the closed form of what it draws from, with a denoiser made by hand."""

import itertools
import math
from functools import lru_cache

import pytest
import torch

from bd3_ds.sampling.options import Options, WindowPlan
from bd3_ds.sampling.sampler import sample

TOKENS, MASK, VOCAB = 3, 3, 4
FREE = 3  # masked places of a text, behind one given token
START = (MASK,) * FREE


@lru_cache
def logits_of(state):
    """Raw logits [FREE, VOCAB] of a partly masked text: random by state, so that the order of unmasking matters."""
    number = sum(token * VOCAB**place for place, token in enumerate(state))
    noise = torch.randn(FREE, VOCAB, generator=torch.Generator().manual_seed(number + 17), dtype=torch.float64)
    return 1.2 * noise


def probabilities(state):
    """p [FREE, TOKENS] of each place's token."""
    return logits_of(state)[:, :MASK].softmax(-1)


class HandMade:
    """A denoiser that looks its logits up."""

    vocab_size, cache_forwards, device = VOCAB, 0, torch.device("cpu")

    def __len__(self):
        return 0

    def restart(self):
        pass

    def predict(self, block, at, sigma, read):
        logits = torch.stack([logits_of(tuple(row)) for row in block[:, 1:].tolist()])  # [N, FREE, VOCAB]
        padded = torch.cat([torch.zeros(len(block), 1, VOCAB), logits], dim=1)
        return read(padded.flatten(0, 1)[at], 0)


def write(state, places):
    """The texts that come of writing `places` of a state, each token by itself, and their probabilities."""
    p = probabilities(state)
    for tokens in itertools.product(range(TOKENS), repeat=len(places)):
        after, chance = list(state), 1.0
        for place, token in zip(places, tokens, strict=True):
            after[place], chance = token, chance * float(p[place, token])
        yield tuple(after), chance


def expected(choose, steps=None):
    """The closed form {text: probability}, where choose(state, masked places, steps left) yields (places, chance)."""

    def texts_from(state, left):
        masked = [place for place in range(FREE) if state[place] == MASK]
        if not masked:
            return {state: 1.0}
        total = dict.fromkeys(itertools.product(range(TOKENS), repeat=FREE), 0.0)
        for places, chance in choose(state, masked, left):
            for after, likelihood in write(state, places) if places else [(state, 1.0)]:
                for text, rest in texts_from(after, None if left is None else left - 1).items():
                    total[text] += chance * likelihood * rest
        return total

    return texts_from(START, steps)


def one_at_random(_state, masked, _left):
    return [([place], 1 / len(masked)) for place in masked]


def each_by_chance(chance_of):
    """Masks are removed independently, with chance_of(state, place, left)."""

    def choose(state, masked, left):
        for flags in itertools.product([0, 1], repeat=len(masked)):
            chance = 1.0
            for flag, place in zip(flags, masked, strict=True):
                q = chance_of(state, place, left)
                chance *= q if flag else 1 - q
            if chance:
                yield [place for flag, place in zip(flags, masked, strict=True) if flag], chance

    return choose


ancestral = each_by_chance(lambda _state, _place, left: 1 / left)


def analytic(steps):
    def chance_of(state, place, left):
        if left == 1:
            return 1.0
        now, then = (min(-math.log1p(-t), 6.9078) if t < 1 else 6.9078 for t in (left / steps, (left - 1) / steps))
        scores = float(logits_of(state)[place, :MASK].exp().sum()) / math.expm1(now) / (VOCAB - 1)
        return min(1.0, math.expm1(now - then) * scores)

    return each_by_chance(chance_of)


def by_confidence(count_of):
    """The count_of(sorted probabilities of the likeliest tokens) most confident positions."""

    def choose(state, masked, _left):
        confidence = probabilities(state).max(-1).values
        order = sorted(masked, key=lambda place: -float(confidence[place]))
        return [(order[: count_of([float(confidence[place]) for place in order])], 1.0)]

    return choose


def by_entropy(bound):
    def choose(state, masked, _left):
        entropy = {place: float(torch.special.entr(probabilities(state)[place]).sum()) for place in masked}
        order = sorted(masked, key=entropy.get)
        kept = [place for i, place in enumerate(order) if sum(entropy[other] for other in order[:i]) <= bound]
        return [(kept, 1.0)]

    return choose


CASES = {
    "first hitting": ({}, expected(one_at_random)),
    "ancestral, 1 step": ({"steps": 1}, expected(ancestral, 1)),
    "ancestral, 2 steps": ({"steps": 2}, expected(ancestral, 2)),
    "ancestral, 5 steps": ({"steps": 5}, expected(ancestral, 5)),
    "analytic, 3 steps": ({"steps": 3, "analytic": True}, expected(analytic(3), 3)),
    "analytic, 8 steps": ({"steps": 8, "analytic": True}, expected(analytic(8), 8)),
    "threshold": (
        {"threshold": 0.6},
        expected(by_confidence(lambda ordered: max(1, sum(value >= 0.6 for value in ordered)))),
    ),
    "entropy bound": ({"entropy_bound": 0.9}, expected(by_entropy(0.9))),
    "two most confident": ({"tokens_per_step": 2}, expected(by_confidence(lambda _: 2))),
}


def draw(count, seed=3, **how):
    plan = WindowPlan(FREE + 1, FREE + 1, FREE + 1, 2, whole=True)
    return sample(
        HandMade(), plan, torch.tensor([0]), num=count, mask_id=MASK, options=Options(**how), timed=True, seed=seed
    )


def chi_square(tokens, wanted):
    """How many standard deviations the statistic of texts [N, 1 + FREE] lies above its mean."""
    texts, counts = tokens[:, 1:].unique(dim=0, return_counts=True)
    seen = dict(zip(map(tuple, texts.tolist()), counts.tolist(), strict=True))
    expected_counts = {text: chance * len(tokens) for text, chance in wanted.items()}
    large = [text for text, count in expected_counts.items() if count >= 5]
    rest = len(tokens) - sum(expected_counts[text] for text in large)
    pairs = [(seen.get(text, 0), expected_counts[text]) for text in large]
    if rest > 5:
        pairs.append((len(tokens) - sum(count for count, _ in pairs), rest))
    freedom = len(pairs) - 1
    assert freedom >= 10
    return (sum((count - want) ** 2 / want for count, want in pairs) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_the_closed_form(name):
    how, wanted = CASES[name]
    assert sum(wanted.values()) == pytest.approx(1)
    assert chi_square(draw(6000, **how).tokens, wanted) < 4


def test_the_test_can_tell_the_orders_apart():
    first = CASES["first hitting"][1]
    for name in ("ancestral, 1 step", "ancestral, 2 steps", "threshold", "entropy bound", "two most confident"):
        assert chi_square(draw(6000, **CASES[name][0]).tokens, first) > 8, name


def test_ancestral_tends_to_first_hitting():
    """In distribution, by the closed forms, with an error of 1/T; and text for text, once no two masks share a step."""
    first = expected(one_at_random)

    def distance(steps):
        wanted = expected(ancestral, steps)
        return sum(abs(wanted[text] - first[text]) for text in first) / 2

    distances = [distance(steps) for steps in (1, 2, 4, 8)]
    assert distances[0] > 0.02 and all(b < 0.7 * a for a, b in itertools.pairwise(distances))
    assert torch.equal(draw(200, steps=10**9).tokens, draw(200).tokens)


def test_analytic_is_ancestral_where_scores_sum_to_the_true_rate():
    """A normalised posterior times (1 - t) / t: the rate at which the forward process would mask."""

    class Exact(HandMade):
        def predict(self, block, at, sigma, read):
            def exact(logits, first):
                rows = at[first : first + len(logits)] // block.shape[1]
                mass = logits[:, :MASK].logsumexp(-1)
                return read(logits - mass[:, None] + math.log(VOCAB - 1) + 0 * sigma[rows, None], first)

            return super().predict(block, at, sigma, exact)

    plan = WindowPlan(FREE + 1, FREE + 1, FREE + 1, 2, whole=True)
    drawn = [
        sample(Exact(), plan, torch.tensor([0]), num=300, mask_id=MASK, options=Options(**how), timed=True, seed=5)
        for how in ({"steps": 6}, {"steps": 6, "analytic": True})
    ]
    # Time 1 is clamped to a masking rate of 0.999 there, which moves one mask in some thousands.
    assert (drawn[0].tokens == drawn[1].tokens).float().mean() > 0.995


def test_counts_of_each_order():
    assert draw(50).nfe.tolist() == [FREE] * 50
    one = draw(50, steps=1)
    assert one.nfe.tolist() == [1] * 50 and one.order[:, 1:].unique().tolist() == [1]
    several = draw(200, steps=2).nfe
    assert set(several.tolist()) == {1, 2}  # a step in which nothing falls costs nothing
    assert draw(50, tokens_per_step=2).nfe.tolist() == [2] * 50
    assert draw(50, threshold=1e-9).nfe.tolist() == [1] * 50
    assert draw(50, entropy_bound=0.0).nfe.tolist() == [FREE] * 50
    drawn = draw(300, steps=2)
    by_hand = torch.stack([logits_of(START)[:, :MASK].softmax(-1)[range(FREE), row] for row in drawn.tokens[:, 1:]])
    first = drawn.order[:, 1:] == 1
    torch.testing.assert_close(drawn.probability[:, 1:][first], by_hand[first])
