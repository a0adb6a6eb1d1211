"""Samples that take long or much: memory is known before, and what is drawn when the user stops is kept."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import bd3_ds
from bd3_ds.commands import sample as sample_command
from bd3_ds.config.schema import AR, BD3, MDLM
from bd3_ds.evaluation import api
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.rng import Purpose, generator
from bd3_ds.runtime.samples import read_samples
from bd3_ds.sampling import memory
from bd3_ds.sampling.sampler import ENDED, UniformDraws
from tests.conftest import ROOT
from tests.unit.evaluation.test_api import place  # noqa: F401 (a fixture)

INTERRUPTED = ENDED.index("interrupted")


@pytest.mark.parametrize("spans", [[(0, 3), (3, 700), (690, 1400)], [(5, 9), (2000, 2001)]])
def test_uniform_numbers_do_not_depend_on_when_they_are_made(spans):
    draws = UniformDraws(3, 5, 2, torch.device("cpu"))
    whole = np.stack([generator(3, Purpose.SAMPLING, row).random((2100, 2)) for row in (5, 6)])
    for begin, end in spans:
        np.testing.assert_array_equal(draws.between(begin, end).numpy(), whole[:, begin:end])


def test_uniform_numbers_that_were_passed_are_dropped():
    draws = UniformDraws(3, 0, 1, torch.device("cpu"))
    for begin in range(0, 100_000, 100):
        draws.between(begin, begin + 100)
    assert draws._kept.shape[1] <= 600


@pytest.mark.parametrize("case", [AR, BD3, MDLM])
def test_texts_that_are_cut_are_beginnings_of_the_whole_ones(place, case):  # noqa: F811
    model = bd3_ds.load(str(place / case))
    whole = model.sample(3, 30, seed=4)
    written = 0

    def count(tokens: int) -> None:
        nonlocal written
        written += tokens

    cut = model.sample(3, 30, seed=4, progress=count, stopped=lambda: written >= 40)
    (length,) = set(cut.lengths.tolist())
    assert 5 < length < 30 and cut.ended.tolist() == [INTERRUPTED] * 3
    assert torch.equal(cut.tokens[:, :length], whole.tokens[:, :length])
    assert torch.equal(cut.probability[:, 1:length], whole.probability[:, 1:length])
    assert (cut.order[:, length:] == 0).all() and cut.probability[:, length:].isnan().all()


def test_batches_that_were_not_begun_are_missing(place):  # noqa: F811
    model = bd3_ds.load(str(place / BD3))
    written = []
    cut = model.sample(6, 8, seed=1, batch=2, progress=written.append, stopped=lambda: sum(written) >= 20)
    assert len(cut.tokens) == 4 and cut.ended.tolist() == [0, 0, INTERRUPTED, INTERRUPTED]
    given = torch.ones(6, dtype=torch.long)
    assert cut.begun(given).tolist() == [0, 1, 2, 3]
    assert torch.equal(cut.rows(cut.begun(given)).tokens[:2], model.sample(2, 8, seed=1).tokens)


def test_rows_with_nothing_but_their_prompt_are_not_begun(place):  # noqa: F811
    model = bd3_ds.load(str(place / BD3))
    cut = model.sample(2, 8, seed=1, stopped=lambda: True)
    assert cut.lengths.tolist() == [0, 0] and len(cut.begun(torch.ones(2, dtype=torch.long))) == 0


def test_ctrl_c_keeps_what_is_drawn(place, tmp_path):  # noqa: F811
    file = tmp_path / "samples.json"
    words = ["run.py", "sample", str(place / BD3), "--num", "2", "--length", "2000000", "--stop", "none"]
    process = subprocess.Popen(
        [sys.executable, *words, "--json", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert "drawing 2 texts of 2,000,000 tokens" in process.stderr.readline()
    time.sleep(3.0)  # some tokens are written by then, and never all
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == f"interrupted: 2 of 2 texts were begun, and are above; {file} holds them"
    samples = read_samples(file)
    assert samples["ended"] == ["interrupted"] * 2 and out.count("[ended: interrupted]") == 2
    assert all(1 < len(row) < 2_000_000 for row in samples["token_ids"])


def test_texts_past_the_machine_are_refused_before_they_are_drawn(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(api, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**30)
    with pytest.raises(
        UserError, match=r"length=100000000 for num=4 takes about 17.9 GiB beside the model, more than 90% of the "
    ):
        bd3_ds.load(str(place / BD3)).generate(4, 100_000_000)
    with pytest.raises(UserError, match=r"length=100000000 for num=1 takes about .* GiB .* length=\d+ fits, or"):
        sample_command.main([str(place / BD3), "--num", "1", "--length", "100000000"])
    assert "drawing" not in capsys.readouterr().err


@pytest.mark.parametrize("num, batch, length", [(1, 1, 10**6), (4, 64, 10**5), (300, 64, 10**4)])
def test_the_length_that_a_refusal_names_fits(place, num, batch, length):  # noqa: F811
    model = bd3_ds.load(str(place / BD3))

    def needed(tokens: int) -> int:
        return model.memory_to_sample(num, tokens, batch)

    free = needed(length) // 2
    with pytest.raises(UserError) as told:
        memory.require_memory(needed, free, num, length)
    fits = int(str(told.value).partition("; length=")[2].partition(" ")[0])
    assert needed(fits) <= memory.SPARE * free and length // 8 < fits < length


def test_no_length_is_named_where_none_fits():
    with pytest.raises(UserError, match=r"; draw fewer texts at once \(num, batch\)$"):
        memory.require_memory(lambda tokens: 2**30 + tokens, 2**20, 10**6, 8)


def test_memory_counts_the_tensors_that_are_kept(place):  # noqa: F811
    model = bd3_ds.load(str(place / BD3))
    for num, batch in ((4, 64), (5, 2)):
        samples = model.sample(num, 64, batch=batch)
        kept = sum(tensor.nbytes for tensor in (samples.tokens, samples.order, samples.probability))
        assert kept == num * 64 * memory.KEPT
        assert model.memory_to_sample(num, 64, batch) >= kept * (2 if num > batch else 1)


def test_small_models_set_no_high_expectations(place, tmp_path, capsys):  # noqa: F811
    assert sample_command.main([str(place / BD3), "--num", "1", "--json", str(tmp_path / "a.json")]) == 0
    assert "expect words without sense" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["ended"][0] in ENDED
