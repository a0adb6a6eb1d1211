"""A source of known entropy against brute force, and the bound against that source."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_ds.data.pack import open_pack
from bd3_ds.data.synthetic import MarkovSource
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.likelihood import Condition, Texts
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.runtime.errors import UserError
from benchmarks.entropy import judge, stderr_of_mean
from data_prep import synthetic

SYMBOLS = 3
END, MASK, VOCAB = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2  # as number_tokenizer has them
Change = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def source() -> MarkovSource:
    return MarkovSource(SYMBOLS, seed=3)


def sequences(source: MarkovSource, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All S^length sequences [M, length] and their probabilities [M], factor by factor."""
    rows = np.array(list(itertools.product(range(source.symbols), repeat=length)))
    p = source.stationary[rows[:, 0]]
    for i in range(1, length):
        p = p * source.transition[rows[:, i - 1], rows[:, i]]
    return rows, p


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("symbols", [2, 3, 5])
def test_entropy_rate_is_brute_force(symbols: int) -> None:
    source = MarkovSource(symbols, seed=7)
    length = 6
    rows, p = sequences(source, length)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    one_more = entropy(p) - entropy(p.reshape(-1, symbols).sum(1))  # H(X_1 … X_n) - H(X_1 … X_{n-1})
    assert source.entropy_rate == pytest.approx(one_more, abs=1e-12)
    assert p @ source.nll(rows) == pytest.approx((length - 1) * source.entropy_rate, abs=1e-12)
    given_first = p / source.stationary[rows[:, 0]]
    np.testing.assert_allclose(source.nll(rows), -np.log(given_first), atol=1e-12)


@pytest.mark.parametrize(("symbols", "seed"), [(2, 0), (3, 3), (16, 1), (16, 2), (100, 5)])
def test_stationary(symbols: int, seed: int) -> None:
    source = MarkovSource(symbols, seed)
    np.testing.assert_allclose(source.transition.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(source.stationary @ source.transition, source.stationary, atol=1e-12)
    assert source.stationary.sum() == pytest.approx(1, abs=1e-12)
    assert source.transition.min() > 0 and source.stationary.min() > 0
    assert 0 < source.entropy_rate < entropy(source.stationary) <= np.log(symbols) + 1e-12


def test_samples_follow_the_source() -> None:
    source = MarkovSource(16, seed=1)
    assert source.entropy_rate < 0.6 * np.log(16)  # a model has something to learn
    rows = source.sample(20_000, 32)
    per_token = source.nll(rows) / 31
    assert abs(per_token.mean() - source.entropy_rate) < 4 * stderr_of_mean(per_token)
    for position in (0, 1, 31):
        share = np.bincount(rows[:, position], minlength=16) / len(rows)
        error = np.sqrt(source.stationary * (1 - source.stationary) / len(rows))
        assert (abs(share - source.stationary) < 5 * error).all()
    pairs = np.zeros((16, 16))
    np.add.at(pairs, (rows[:, 10], rows[:, 11]), 1)
    expected = len(rows) * source.stationary[:, None] * source.transition
    chi_square = ((pairs - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 5 * np.sqrt(2 * 255)


def test_seeds_and_parts() -> None:
    one, same, other = MarkovSource(16, 1), MarkovSource(16, 1), MarkovSource(16, 2)
    assert (one.transition == same.transition).all() and (one.transition != other.transition).any()
    rows = one.sample(8, 32)
    assert rows.dtype == np.int64 and rows.shape == (8, 32) and rows.min() >= 0 and rows.max() < 16
    assert (rows == same.sample(8, 32)).all()
    assert (rows[:3] == one.sample(3, 32)).all()
    for others in (one.sample(8, 32, part=1), one.sample(8, 32, piece=1), other.sample(8, 32)):
        assert (rows != others).any()


def test_pack_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "ROWS_AT_ONCE", 8)
    words = ["--symbols", "5", "--length", "16", "--chunks", "20", "--seed", "4", "--out", str(tmp_path / "pack")]
    assert synthetic.main(words) == 0
    pack = open_pack(tmp_path / "pack")
    source = MarkovSource.of(pack.manifest.settings)
    rows = np.concatenate([source.sample(n, 16, piece=i) for i, n in enumerate((8, 8, 4))])
    assert (pack.all_tokens() == rows).all() and len(np.unique(rows, axis=0)) == 20
    assert all(pack.doc_starts(i).tolist() == [0] for i in range(20))
    loaded = pack.tokenizer
    assert loaded.fingerprint == number_tokenizer(5).fingerprint == pack.manifest.tokenizer.fingerprint
    assert (loaded.eos_id, loaded.mask_id, loaded.vocab_size) == (5, 6, 7)
    assert loaded.encode_batch([loaded.decode(rows[3])]) == [rows[3].tolist()]

    capsys.readouterr()
    assert synthetic.main(words) == 0 and "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="another part"):
        synthetic.main([*words, "--part", "1"])
    assert synthetic.main([*words, "--part", "1", "--overwrite"]) == 0
    held_out = open_pack(tmp_path / "pack")
    assert (MarkovSource.of(held_out.manifest.settings).transition == source.transition).all()
    assert not (held_out.all_tokens() == rows).all(1).any()


def test_other_packs_have_no_source() -> None:
    settings = MarkovSource(5, 4).settings()
    with pytest.raises(UserError, match="not of a Markov source"):
        MarkovSource.of({"source": "openwebtext", "length": 16})
    with pytest.raises(UserError, match="another version"):
        MarkovSource.of(settings | {"entropy_rate": settings["entropy_rate"] + 1e-6})


def oracle(source: MarkovSource, size: int, change: Change | None = None) -> Condition:
    """The exact denoiser of the chain, by enumeration: logits log p(x_i | unmasked tokens of the block, clean past).

    Of the past only the last token matters. A block's S^L' fillings are weighed by their probability given it, those
    that contradict an unmasked token fall away, and what is left is summed by the symbol at i. `change` alters the
    marginals [N, S] of tokens [N] on their way out.
    """
    fillings = torch.tensor(list(itertools.product(range(source.symbols), repeat=size)))  # [F, L']
    transition = torch.from_numpy(source.transition)
    inside = transition[fillings[:, :-1], fillings[:, 1:]].prod(1)  # [F]
    after = transition[:, fillings[:, 0]] * inside  # [S, F] given the token before the block
    at_start = torch.from_numpy(source.stationary)[fillings[:, 0]] * inside  # [F] for the first block
    holds = torch.nn.functional.one_hot(fillings, source.symbols).double()  # [F, L', S]

    def condition(x0: Tensor) -> likelihood.ViewDenoiser:
        batch, length = x0.shape
        before = after[x0[:, size - 1 : -1 : size]]  # [b, B - 1, F]
        prior = torch.cat([at_start.expand(batch, 1, -1), before], 1)  # [b, B, F]

        def denoise(x_t: Tensor, at: Tensor, read: SubsNats) -> tuple[Tensor, Tensor]:
            views = x_t.shape[1]
            blocks = x_t.reshape(batch, views, -1, 1, size)
            agrees = ((fillings == blocks) | (blocks == MASK)).all(-1)  # [b, K, B, F]
            joint = torch.einsum("bkgf,fls->bkgls", prior[:, None] * agrees, holds)
            marginals = (joint / joint.sum(-1, keepdim=True)).reshape(batch * views * length, -1)[at]  # [N, S]
            if change is not None:
                marginals = change(marginals, x0[:, None].expand_as(x_t).flatten()[at])
            logits = torch.full((len(marginals), VOCAB), -torch.inf, dtype=torch.float64)
            logits[:, :SYMBOLS] = marginals.log()
            return read.of_logits(logits)

        return denoise

    return condition


class Raw:
    """Stands in for `SubsNats` and hands the logits out."""

    def of_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits, logits


def test_the_oracle_is_bayes(source: MarkovSource) -> None:
    """Marginals of a few hand-written views, straight from the transition matrix."""
    p = torch.from_numpy(source.transition)
    x0 = torch.tensor([[2, 0, 1, 1, 0, 2, 2, 1]])
    x_t = torch.tensor([[[2, MASK, 1, MASK, MASK, MASK, 2, MASK]]])
    at = (x_t == MASK).flatten().nonzero()[:, 0]
    logits, _ = oracle(source, 4)(x0)(x_t, at, Raw())
    between = p[2] * p[:, 1]  # x_1 given x_0 = 2, x_2 = 1
    second = (p @ p)[:, 2] * p[1]  # x_4 given x_3 = 1 of the clean past, x_6 = 2
    third = (p @ p)[1] * p[:, 2]  # x_5 given the same
    expected = torch.stack([between / between.sum(), p[1], second / second.sum(), third / third.sum(), p[2]])
    torch.testing.assert_close(logits[:, :SYMBOLS].exp(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_bound_of_the_oracle_is_the_likelihood(source: MarkovSource, size: int) -> None:
    """Exact conditionals make every order of a block a factorisation of the same probability: the bound is tight."""
    rows = source.sample(6, 16)
    bound = likelihood.exact(oracle(source, size), Texts(torch.from_numpy(rows)), size, MASK)
    np.testing.assert_allclose(bound.nelbo.sum(1).numpy(), source.nll(rows), rtol=0, atol=1e-5)
    # Not only the sum: each block has the likelihood of its own tokens.
    tokens = -np.log(source.transition)[rows[:, :-1], rows[:, 1:]]
    by_block = np.pad(tokens, ((0, 0), (1, 0))).reshape(6, -1, size).sum(-1)
    np.testing.assert_allclose(bound.nelbo.view(6, -1, size).sum(-1).numpy(), by_block, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [4, 8])
def test_the_stratified_bound_of_the_oracle(source: MarkovSource, size: int) -> None:
    rows = source.sample(32, 16)
    bound = likelihood.stratified(oracle(source, size), Texts(torch.from_numpy(rows)), size, MASK, views=64, seed=0)
    gap = bound.nelbo.sum().item() - source.nll(rows).sum()
    error = bound.variance.sum().sqrt().item()
    assert abs(gap) < 4 * error and error < 0.02 * source.nll(rows).sum()


def test_the_autoregressive_oracle(source: MarkovSource) -> None:
    rows = source.sample(6, 16)
    logits = torch.full((6, 16, VOCAB), -torch.inf)
    logits[..., :SYMBOLS] = torch.from_numpy(np.log(source.transition[rows]))

    def network(x0: Tensor, at: Tensor, read: SubsNats) -> tuple[Tensor, Tensor]:
        return read.of_logits(logits.flatten(0, 1)[at])

    bound = likelihood.autoregressive(network, Texts(torch.from_numpy(rows)), MASK)
    np.testing.assert_allclose(bound.nelbo.sum(1).numpy(), source.nll(rows), rtol=0, atol=1e-5)


def worse(p: Tensor, target: Tensor) -> Tensor:
    return 0.9 * p + 0.1 / SYMBOLS


def cheating(p: Tensor, target: Tensor) -> Tensor:
    """One part in a hundred is copied from the answer."""
    return 0.99 * p + 0.01 * torch.nn.functional.one_hot(target, SYMBOLS)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_benchmark_would_say(source: MarkovSource, size: int) -> None:
    """The oracle is level, a worse denoiser above, and a small leak of the answer is found out."""
    rows = source.sample(256, 16)
    verdicts = []
    for change in (None, worse, cheating):
        bound = likelihood.exact(oracle(source, size, change), Texts(torch.from_numpy(rows)), size, MASK)
        verdicts.append(judge(bound.nelbo.sum(1).numpy(), source.nll(rows), 15, bound.stderr.numpy()))
    level, above, below = verdicts
    assert not level["below"] and abs(level["gap"]) < 1e-6
    assert not above["below"] and above["errors"] > 3
    assert below["below"] and below["gap"] < 0


def test_judge() -> None:
    truth = np.array([10.0, 20.0, 30.0, 40.0])
    verdict = judge(truth + np.array([1, 2, 3, 2]), truth, 10, np.array([0.3, 0.0, 0.4, 0.0]))
    assert verdict["bound"] == pytest.approx(2.7) and verdict["truth"] == pytest.approx(2.5)
    assert verdict["gap"] == pytest.approx(0.2)  # nats per token
    assert verdict["stderr"] == pytest.approx(0.1 * np.sqrt(2 / 3) / 2)  # deviations -1, 0, 1, 0
    assert verdict["estimator_stderr"] == pytest.approx(0.5 / 4 / 10)
    assert verdict["errors"] == pytest.approx(verdict["gap"] / verdict["stderr"])
    assert verdict["below"] is False
    none, spread = np.zeros(4), np.array([-1, 1, -1, 1])
    assert judge(truth, truth, 10, none)["below"] is False  # level to the last bit, without any spread
    assert judge(truth - 1.0, truth, 10, none)["below"] is True
    error = stderr_of_mean(spread)
    assert judge(truth + spread - 2.9 * error, truth, 10, none)["below"] is False
    assert judge(truth + spread - 3.1 * error, truth, 10, none)["below"] is True
