"""The Python API and `run.py sample` on small exports of every objective."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bd3_ds
from bd3_ds.checkpoint.export import write_export
from bd3_ds.commands import convert as convert_command
from bd3_ds.commands import sample as sample_command
from bd3_ds.config.load import load_defaults
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.diffusion.subs import subs_nll
from bd3_ds.evaluation import token_scores
from bd3_ds.model.build import dit_config
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.errors import UserError
from tests.helpers.tiny import tiny_export, tiny_run

LENGTH, SYMBOLS = 8, 20
EOS, MASK, VOCAB = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Directory of one export per objective, named after it, and of bd3-1 (block size 1) and mute (no tokenizer)."""
    root = tmp_path_factory.mktemp("exports")
    number_tokenizer(SYMBOLS).save(root / "tokenizer")
    cases = {name: (name, 2 if name == BD3 else None) for name in OBJECTIVES} | {"bd3-1": (BD3, 1), "mute": (BD3, 2)}
    for case, (objective, size) in cases.items():
        values = {
            "run_dir": "unused",
            "data.train": "unused",
            "data.length": LENGTH,
            "objective.name": objective,
            "objective.block_size": size,
            "model.vocab_size": VOCAB,
            "model.mask_id": MASK,
            "model.hidden_size": 16,
            "model.layers": 2,
            "model.heads": 2,
            "model.cond_size": 8,
        }
        run = load_defaults(values, "the test")
        generator = torch.Generator().manual_seed(0)
        shapes = DiT(dit_config(run.model, objective)).state_dict()
        weights = {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in shapes.items()}
        write_export(root / case, weights, run, None if case == "mute" else root / "tokenizer", step=7)
    return root


@pytest.fixture(scope="module")
def models(place):
    return {case: bd3_ds.load(str(place / case)) for case in (*OBJECTIVES, "bd3-1", "mute")}


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, SYMBOLS, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def noisy(text):
    return torch.where(torch.rand(text.shape, generator=torch.Generator().manual_seed(2)) < 0.5, MASK, text)


def test_what_is_loaded(models):
    assert [models[case].block_size for case in (AR, BD3, MDLM, SEDD, "bd3-1")] == [1, 2, LENGTH, LENGTH, 1]
    assert models[BD3].tokenizer.vocab_size == VOCAB == models[BD3].vocab_size
    assert models["mute"].tokenizer is None
    assert models[BD3].run.data.length == LENGTH


def test_logits_are_the_networks_own(models, text, noisy):
    sigma = torch.tensor([0.1, 1.0, 5.0])
    for case, x_t, x0, level in ((AR, text, None, None), (BD3, noisy, text, None), (MDLM, noisy, None, None)):
        logits = models[case].logits(x_t, x0, sigma=level)
        assert logits.shape == (3, LENGTH, VOCAB) and logits.dtype == torch.float32 and not logits.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(logits, models[case].network(x_t, x0, block_size=models[case].block_size))
    with torch.no_grad():
        expected = models[SEDD].network(noisy, block_size=LENGTH, sigma=sigma)
    torch.testing.assert_close(models[SEDD].logits(noisy, sigma=sigma), expected)
    torch.testing.assert_close(models[SEDD].logits(noisy.int().tolist(), sigma=sigma.tolist()), expected)
    torch.testing.assert_close(models[MDLM].logits(noisy, text), models[MDLM].logits(noisy))


def test_ar_and_block_size_one_are_exact(models, text):
    score = models[AR].score(text)
    logits = models[AR].logits(text)
    expected = subs_nll(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), MASK).view(3, -1)
    torch.testing.assert_close(score.nelbo[:, 1:], expected.double())
    assert score.forwards == 3

    score = models["bd3-1"].score(text)
    x_t = torch.full_like(text, MASK)
    x_t[:, 0] = text[:, 0]
    nll = subs_nll(models["bd3-1"].logits(x_t, text).flatten(0, 1), text.flatten(), MASK).view(3, -1)
    torch.testing.assert_close(score.nelbo[:, 1:], nll[:, 1:].double(), rtol=1e-5, atol=1e-5)
    for exact in (models[AR].score(text, "mc"), score, models[BD3].score(text)):
        assert exact.stderr.tolist() == [0, 0, 0] and exact.nelbo[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", [BD3, MDLM])
@pytest.mark.parametrize("estimator", ["stratified", "mc"])
def test_sampled_scores_agree_with_exact(models, text, case, estimator):
    exact = models[case].score(text)
    sampled = models[case].score(text, estimator, views=300)
    assert sampled.nelbo.shape == text.shape and sampled.stderr.shape == (3,)
    assert ((sampled.nelbo - exact.nelbo).sum(1).abs() < 4 * sampled.stderr + 0.01 * exact.nelbo.sum(1)).all()


def test_sedd_scores_by_monte_carlo(models, text):
    score = models[SEDD].score(text, "mc", views=200)
    again = models[SEDD].score(text, views=200, seed=1)
    assert (score.stderr > 0).all() and score.nelbo[:, 0].tolist() == [0, 0, 0]
    spread = (score.stderr**2 + again.stderr**2).sqrt()
    assert ((score.nelbo - again.nelbo).sum(1).abs() < 4 * spread).all()


@pytest.mark.parametrize("case, estimator", [(AR, "exact"), (BD3, "exact"), (BD3, "stratified"), (SEDD, "mc")])
def test_scores_do_not_depend_on_how_rows_are_split(models, text, monkeypatch, case, estimator):
    whole = models[case].score(text, estimator, views=3)
    monkeypatch.setattr(token_scores, "TOKENS_AT_ONCE", 3 * LENGTH)
    parts = models[case].score(text, estimator, views=3)
    torch.testing.assert_close(parts.nelbo, whole.nelbo, rtol=1e-5, atol=1e-5)
    assert parts.forwards == whole.forwards


def test_a_last_block_that_is_not_whole_ends_in_unknown_tokens(models, text):
    """Tokens 0 and 1 and 2 in blocks of two: what stands at position 3 is masked and nobody's."""
    score = models[BD3].score(text[:, :3])
    clean = text[:, :4].clone()
    clean[:, 3] = MASK
    nll = 0
    for place in (1, 2):
        x_t = clean.clone()
        x_t[:, place] = MASK
        nll = nll + subs_nll(models[BD3].logits(x_t, clean)[:, place], text[:, place], MASK)
    torch.testing.assert_close(score.nelbo.sum(1), nll.double(), rtol=1e-5, atol=1e-5)
    assert score.nelbo.shape == (3, 3) and score.tokens == 6
    hidden = models[BD3].score(clean, scored=(clean != MASK) & (torch.arange(4) > 0))
    torch.testing.assert_close(hidden.nelbo[:, :3], score.nelbo)
    assert hidden.nelbo[:, 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", [AR, "bd3-1", BD3, MDLM])
def test_a_text_pays_for_its_beginning_and_for_the_rest_given_that(models, text, case):
    """A difference of two scores where each is a likelihood; elsewhere where the beginning is whole blocks."""
    behind = torch.arange(LENGTH).expand(3, -1) >= 4
    rest = models[case].score(text, scored=behind)
    assert rest.tokens == 12 and rest.nelbo[:, :4].abs().max() == 0
    if case != MDLM:
        expected = models[case].score(text).nelbo.sum(1) - models[case].score(text[:, :4]).nelbo.sum(1)
        torch.testing.assert_close(rest.nelbo.sum(1), expected, rtol=1e-5, atol=1e-5)
    sampled = models[case].score(text, "stratified", views=300, scored=behind)
    assert ((sampled.nelbo - rest.nelbo).sum(1).abs() < 4 * sampled.stderr + 1e-5).all()


def test_rows_keep_their_numbers_in_parts(models, text):
    whole = models[MDLM].score(text, "stratified", views=3).nelbo
    torch.testing.assert_close(models[MDLM].score(text[1:], "stratified", views=3, first_row=1).nelbo, whole[1:])
    assert not torch.allclose(models[MDLM].score(text[1:], "stratified", views=3).nelbo, whole[1:])


def test_shorter_texts_are_scored(models, text):
    for case in OBJECTIVES:
        estimator = "mc" if case == SEDD else "exact"
        assert models[case].score(text[:, :4], estimator).nelbo.shape == (3, 4)


@pytest.mark.parametrize("case", [*OBJECTIVES, "bd3-1"])
def test_texts_are_scored_behind_bos(models, case):
    """By text what `score` says of its tokens, whatever the other texts are and however long."""
    texts = ["3 1 4 1 5", "2", "9 9"]
    score = models[case].score(texts, views=4)
    assert score.by_row.tolist() == [5, 1, 2] and score.tokens == 8 and score.nelbo.shape == (3, 6)
    assert score.nelbo[:, 0].tolist() == [0, 0, 0] and score.nelbo[1, 2:].abs().max() == 0
    assert score.estimator == ("mc" if case == SEDD else "exact")
    if case != SEDD:  # whose noise depends on which text comes first
        for row, text in enumerate(texts):
            ids = [[EOS, *map(int, text.split())]]
            assert score.nats[row].item() == pytest.approx(models[case].score(ids).nelbo.sum().item(), rel=1e-5)
        assert models[case].score(texts[0]).nats.tolist() == pytest.approx(score.nats[:1].tolist(), rel=1e-5)
        assert score.stderr.tolist() == [0, 0, 0]
    torch.testing.assert_close(score.ppl, (score.nats / torch.tensor([5, 1, 2])).exp())
    assert score.perplexity == pytest.approx(math.exp(score.nats.sum().item() / 8))
    torch.testing.assert_close(score.ppl_stderr, score.ppl * score.stderr / score.by_row)


@pytest.mark.parametrize("case", [AR, BD3])
def test_texts_beyond_the_context_are_scored_in_windows(models, case):
    """BOS and 9 tokens where 8 are seen at once: AR sees tokens 2 … 9 for the last two, BD3 blocks 1 … 4."""
    ids = [EOS, 3, 1, 4, 1, 5, 9, 2, 6, 5]
    score = models[case].score([" ".join(map(str, ids[1:])), "7"])
    first = models[case].score([ids[:8]]).nelbo.sum()
    behind = torch.arange(8)[None] >= 6
    second = models[case].score([ids[2:]], scored=behind).nelbo.sum()
    assert score.by_row.tolist() == [9, 1]
    assert score.nats[0].item() == pytest.approx((first + second).item(), rel=1e-5)
    assert (score.nelbo[0, 1:] > 0).all()


def test_long_blocks_are_sampled_where_nothing_is_asked(place, tmp_path, models):
    """An MDLM of 12 tokens: nine of them to score are too many for all masks, and the score says so."""
    wide = wider(place, tmp_path, 12)
    few, many = wide.score(["1 2 3"]), wide.score(["1 2 3 4 5 6 7 8 9", "1 2 3"], views=64)
    assert (few.estimator, many.estimator) == ("exact", "exact, stratified")
    assert many.stderr[0] > 0 and many.stderr[1] == 0 and many.nats[1].item() == pytest.approx(few.nats[0].item())
    assert wide.score([[EOS, *range(1, 10)]]).estimator == "stratified"
    exact = wide.score([[EOS, *range(1, 10)]], "exact").nats
    assert abs(exact[0] - many.nats[0]) < 4 * many.stderr[0]
    assert wide.score(["1 2 3 4 5 6 7 8 9"], views=1).stderr.isnan().all()


def wider(place, tmp_path, length):
    """The MDLM as if it had been trained with longer texts."""
    copy = tmp_path / "wide"
    shutil.copytree(place / MDLM, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(f"length: {LENGTH}\n", f"length: {length}\n"))
    return bd3_ds.load(str(copy))


def test_characters_that_the_tokenizer_lacks_are_said(tmp_path):
    run = tiny_run(tmp_path)
    model = bd3_ds.load(str(tiny_export(run)))
    with pytest.warns(UserWarning, match=r"text 1 \('数'\) has what the tokenizer cannot write; it is scored as 1 unk"):
        assert model.score(["the", "数"]).by_row[1] >= 1


def test_precision(place, text):
    """bf16 is in the weights, and near fp32."""
    model = bd3_ds.load(str(place / AR), precision="bf16")
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in bd3_ds.load(str(place / AR)).network.parameters()} == {torch.float32}
    logits = bd3_ds.load(str(place / AR), precision="fp32").logits(text)
    assert 0 < (model.logits(text).float() - logits).abs().max() < 0.1 * logits.abs().max()
    with pytest.raises(UserError, match=r"device=None cannot be used .*'cpu' always can"):
        bd3_ds.load(str(place / AR), device=None)
    with pytest.raises(UserError, match="precision=bf61 is unknown; did you mean 'bf16'"):
        bd3_ds.load(str(place / AR), precision="bf61")


@pytest.mark.parametrize("case", OBJECTIVES)
def test_a_folder_for_hugging_face_is_loaded_as_it_is(place, tmp_path, models, text, noisy, case):
    assert convert_command.main(["--from", "export", "--to", "hf", str(place / case), str(tmp_path / "hf")]) == 0
    model = bd3_ds.load(str(tmp_path / "hf"))
    given = {AR: (text,), BD3: (noisy, text)}.get(case, (noisy,))
    sigma = {"sigma": torch.tensor([0.1, 1.0, 5.0])} if case == SEDD else {}
    assert torch.equal(model.logits(*given, **sigma), models[case].logits(*given, **sigma))
    assert model.generate("3 1", num=2) == models[case].generate("3 1", num=2)
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"model_type=gpt2; make an export of it first: run.py convert --from hf"):
        bd3_ds.load(str(tmp_path / "hf"))


def test_the_first_word_is_a_number_or_a_prompt(models):
    model = models[BD3]
    assert model.generate("3 1", num=2, seed=4) == model.generate(2, prompt="3 1", seed=4)
    assert len(model.generate("3 1")) == len(model.generate()) == 4
    texts = model.generate(["3 1", "2"], seed=1)
    assert len(texts) == 2 and texts[0].startswith("3 1") and texts[1].startswith("2")
    assert texts == model.generate(prompt=["3 1", "2"], seed=1)
    for call, sentence in (
        (lambda: model.generate(2, num=3), "num is given twice, as 2 and as num=3"),
        (lambda: model.generate("3", prompt="1"), "the prompt is given twice"),
        (lambda: model.generate(num="3"), "num='3' must be a whole number"),
        (lambda: model.score(["3", ""]), r"text 1 \(''\) has no token to score"),
        (lambda: model.score(["3"], scored=[[True]]), "scored and first_row are for token ids"),
        (lambda: model.score(["3"], "exakt"), "did you mean 'exact'"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
    with pytest.raises(UserError, match=r"no tokenizer and knows no texts.*or give token ids"):
        models["mute"].score("3 1")


@pytest.mark.parametrize("case", OBJECTIVES)
def test_generate(models, case):
    texts = models[case].generate(num=3, length=7, seed=5)
    assert len(texts) == 3 and all(isinstance(one, str) for one in texts)
    assert texts == models[case].generate(num=3, length=7, seed=5)
    assert texts[:2] == models[case].generate(num=2, length=7, seed=5)
    assert texts != models[case].generate(num=3, length=7, seed=6)
    prompted = models[case].generate(num=2, prompt="3 1 4 1", temperature=0.7, nucleus=0.9)
    assert all(one.startswith("3 1 4 1") for one in prompted)
    greedy = models[case].generate(num=3, temperature=0)
    assert case != AR or len(set(greedy)) == 1  # in the others the order of unmasking is still drawn


@pytest.mark.parametrize("case, writes", [(AR, 0), (BD3, 3), (MDLM, 0), (SEDD, 0)])
def test_sample_counts(models, case, writes):
    samples = models[case].sample(num=5, batch=2)
    assert samples.tokens.shape == (5, LENGTH) and samples.tokens[:, 0].tolist() == [EOS] * 5
    assert samples.nfe.tolist() == [LENGTH - 1] * 5 and samples.cache_forwards.tolist() == [writes] * 5
    assert torch.equal(samples.tokens, models[case].sample(num=5).tokens)
    assert models[case].sample(num=2, length=1).tokens.tolist() == [[EOS], [EOS]]


@pytest.mark.parametrize("case", OBJECTIVES)
def test_texts_end_at_their_first_eos(models, case):
    whole = models[case].sample(num=40, length=21, temperature=3.0)
    cut = models[case].sample(num=40, length=21, temperature=3.0, stop="eos")
    ends = [([*row[1:], EOS].index(EOS) + 2) for row in whole.tokens.tolist()]
    assert cut.lengths.tolist() == [min(end, 21) for end in ends] and len(set(ends)) > 5
    for row, end in enumerate(ends):
        assert torch.equal(cut.tokens[row, :end], whole.tokens[row, :end])
        assert (cut.tokens[row, end:] == EOS).all() and not cut.order[row, end:].any()
    assert [why == 1 for why in cut.ended] == [end <= 21 for end in ends]
    # Rows that have ended cost nothing, but for what the last block (MDLM, SEDD: the last window) had to write.
    assert (cut.nfe <= whole.nfe).all() and cut.nfe.sum() < whole.nfe.sum()
    assert models[case].decode(cut) == models[case].generate(num=40, length=21, temperature=3.0)


@pytest.mark.parametrize("case", OBJECTIVES)
def test_prompts_of_unequal_length(models, case):
    prompts = ["3 1 4 1 5", "2", ""]
    texts = models[case].generate(3, 12, prompts, stop=())
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    ids = [EOS, 3, 1, 4, 1, 5]
    alone = models[case].sample(1, 12, ids)
    assert torch.equal(models[case].sample(3, 12, prompts).tokens[:1], alone.tokens)
    assert alone.nfe.tolist() == [6 if case in (AR, BD3) else alone.nfe.item()]


@pytest.mark.parametrize("case", OBJECTIVES)
def test_texts_longer_than_the_context(models, case):
    """Past L the window slides: what comes next depends on the last tokens alone."""
    long = models[case].sample(num=2, length=5 * LENGTH + 1, batch=1)
    assert long.tokens.shape == (2, 5 * LENGTH + 1) and not (long.tokens == MASK).any()
    assert torch.equal(long.tokens[:, :LENGTH], models[case].sample(num=2).tokens)
    wide = models[case].sample(num=2, length=16, window=16)
    assert not (wide.tokens == MASK).any()


def test_without_tokenizer(models):
    samples = models["mute"].sample(num=2, prompt=[EOS, 3])
    assert samples.tokens[:, :2].tolist() == [[EOS, 3]] * 2
    for call in (models["mute"].generate, models["mute"].sample):
        with pytest.raises(UserError, match="no tokenizer"):
            call(num=1)


@pytest.mark.parametrize(
    "case, call, sentence",
    [
        (BD3, lambda m, x: m.logits(x), "x0 is missing"),
        (BD3, lambda m, x: m.logits(x, x[:2]), "one shape"),
        (BD3, lambda m, x: m.logits(x, x, sigma=torch.ones(3)), "sigma is for SEDD"),
        (SEDD, lambda m, x: m.logits(x), "sigma is missing"),
        (SEDD, lambda m, x: m.logits(x, sigma=torch.ones(3, 1)), r"must be \[3\]"),
        (MDLM, lambda m, x: m.logits(x[0]), r"shape \[8\]"),
        (MDLM, lambda m, x: m.logits(x[:0]), r"shape \[0, 8\]"),
        (MDLM, lambda m, x: m.logits(x.float()), "integers"),
        (MDLM, lambda m, x: m.logits(x + VOCAB), "ids of this model lie in 0 … 21"),
        (MDLM, lambda m, x: m.logits(x - SYMBOLS), "holds id -"),
        (MDLM, lambda m, x: m.logits([[1, 2], [3]]), "cannot be read"),
        (MDLM, lambda m, x: m.logits(torch.cat([x, x], 1)), "trained with 8"),
        (BD3, lambda m, x: m.score(torch.full_like(x, MASK)), "mask id 21 where they are to be scored"),
        (BD3, lambda m, x: m.score([[1, MASK, 2, 3]], scored=[[False, False, True, True]]), "in a block of 2 before"),
        (AR, lambda m, x: m.score([[1, MASK, 2]], scored=[[False, False, True]]), "in a block of 1 before"),
        (AR, lambda m, x: m.score(x, scored=torch.ones_like(x)), "int64 of shape"),
        (AR, lambda m, x: m.score(x, scored=torch.ones(3, 2) > 0), "must be boolean, one for each of tokens"),
        (AR, lambda m, x: m.score(x, scored=[[True], [True, False]]), "cannot be read"),
        (AR, lambda m, x: m.score(x, scored=x < VOCAB), "true at position 0"),
        (AR, lambda m, x: m.score(x, scored=x > VOCAB), "false everywhere"),
        (BD3, lambda m, x: m.score(x, "exakt"), "did you mean 'exact'"),
        (SEDD, lambda m, x: m.score(x, "stratified"), "estimator=stratified cannot score objective.name=sedd"),
        (BD3, lambda m, x: m.score(x, "mc", views=0), "views=0"),
        (BD3, lambda m, x: m.score(x, "mc", seed=-1), "seed=-1"),
        (AR, lambda m, x: m.score(x[:, :1]), "nothing to score"),
        (AR, lambda m, x: m.generate(length=0), "length=0 must be at least 1"),
        (AR, lambda m, x: m.sample(batch=0), "batch=0"),
        (AR, lambda m, x: m.sample(prompt=" ".join("1" * 8)), "takes 9 tokens, BOS included; the model sees 8"),
        (AR, lambda m, x: m.sample(num=2, prompt=["1", "2", "3"]), "3 rows for num=2"),
        (AR, lambda m, x: m.sample(steps=4), "steps is for diffusion"),
        (AR, lambda m, x: m.sample(tresholt=0.9), "tresholt is no option of the sampler; did you mean 'threshold'"),
        (BD3, lambda m, x: m.sample(threshold=0.9, steps=4), "two orders of unmasking"),
        (BD3, lambda m, x: m.sample(steps=4, analytic=True), "SEDD's sampler"),
        (SEDD, lambda m, x: m.sample(analytic=True), "goes with steps"),
        (BD3, lambda m, x: m.sample(steps=0), "steps=0"),
        (BD3, lambda m, x: m.sample(threshold=1.5), "threshold=1.5"),
        (BD3, lambda m, x: m.sample(entropy_bound=-1.0), "entropy_bound=-1.0"),
        (BD3, lambda m, x: m.sample(tokens_per_step=0), "tokens_per_step=0"),
        (BD3, lambda m, x: m.sample(top_k=0), "top_k=0"),
        (BD3, lambda m, x: m.sample(repetition_penalty=0.5), "repetition_penalty=0.5"),
        (BD3, lambda m, x: m.sample(stop="eso"), "stop=eso is unknown; did you mean 'eos'"),
        (BD3, lambda m, x: m.sample(window=7), "window=7 must be a multiple of the block size 2"),
        (BD3, lambda m, x: m.sample(overlap=3), "overlap=3 must be a multiple of the block size 2 in 2 … 6"),
        (MDLM, lambda m, x: m.sample(overlap=8), "overlap=8 must lie in 1 … 7"),
        (AR, lambda m, x: m.generate(num=0), "num=0"),
        (AR, lambda m, x: m.generate(temperature=-1), "temperature=-1"),
        (AR, lambda m, x: m.generate(nucleus=0), "nucleus=0"),
        (AR, lambda m, x: m.generate(length=2, prompt="1 2 3"), "prompt takes 4 tokens"),
        (AR, lambda m, x: m.sample(num=2, prompt=x), "3 rows for num=2"),
        (AR, lambda m, x: m.sample(prompt=[MASK, 1]), "begins with the mask id"),
        (AR, lambda m, x: m.sample(prompt=[]), "neither of them 0"),
    ],
)
def test_mistakes_are_the_users(models, text, case, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(models[case], text)


def damaged(place, tmp_path, how):
    """A copy of an export with one thing wrong."""
    copy = tmp_path / "copy"
    shutil.copytree(place / BD3, copy)
    weights = copy / "model.safetensors"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "no weights":
        weights.write_bytes(b"not safetensors")
    elif how == "not finite":
        tensors = load_file(weights)
        tensors["embed.weight"][3, 1] = torch.nan
        save_file(tensors, weights)
    elif how == "another network":
        tensors = load_file(weights)
        save_file({name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, weights)
    elif how == "another tokenizer":
        number_tokenizer(SYMBOLS + 5).save(copy / "tokenizer")
    return str(copy)


@pytest.mark.parametrize(
    "how, sentence",
    [
        ("cut short", "is damaged or missing"),
        ("no weights", "is damaged or missing"),
        ("not finite", r"weights that are not finite \(embed.weight\)"),
        ("another network", "do not fit the model: layers.1"),
        ("another tokenizer", "not the tokenizer that the model was trained with: it has 27 tokens and .MASK. at 26"),
    ],
)
def test_damaged_exports_are_told_in_a_sentence(place, tmp_path, how, sentence):
    with pytest.raises(UserError, match=sentence) as told:
        sample_command.main([damaged(place, tmp_path, how)])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--prompt", "1 " * 8], "takes 9 tokens, BOS included; the model sees 8 at once"),
        (["--prompt", "1 " * 8, "--window", "8", "--length", "40"], "takes 9 tokens"),
        (["--prompt", "1 2 3", "--length", "2"], "but length=2"),
        (["--threshold", "2"], "threshold=2.0 must lie in"),
        (["--window", "5"], "window=5 must be a multiple of the block size 2"),
    ],
)
def test_commands_with_mistakes_are_told_in_a_sentence(place, words, sentence):
    with pytest.raises(UserError, match=sentence):
        sample_command.main([str(place / BD3), *words])


def test_text_that_the_tokenizer_cannot_write(models, monkeypatch):
    monkeypatch.setattr(models[BD3].tokenizer, "unk_id", 7)
    with pytest.raises(UserError, match=r"prompt '1 7' has a character that the tokenizer of .* lacks"):
        models[BD3].generate(prompt="1 7")


def test_places_and_devices_that_are_not_there(place):
    with pytest.raises(UserError, match="not found"):
        bd3_ds.load(str(place / "nowhere"))
    for device in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match="cannot be used"):
            bd3_ds.load(str(place / AR), device=device)


def test_sample_command(place, tmp_path, capsys):
    file = tmp_path / "out" / "samples.json"
    words = [str(place / BD3), "--num", "2", "--length", "7", "--prompt", "3 1", "--seed", "9", "--stop", "none"]
    assert sample_command.main([*words, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert all(text in out for text in record["texts"]) and out.count(sample_command.RULE) == 3
    assert "8 tokens, 10 denoiser evaluations and 6 forwards that only wrote the cache" in out
    assert record["tokens"] == 8 and record["nfe"] == [5, 5] and record["cache_forwards"] == [3, 3]
    assert record["given"] == [3, 3] and record["ended"] == ["length"] * 2
    for row in range(2):
        assert record["pieces"][row][:3] == ["[EOS]", "3", "1"] and len(record["token_ids"][row]) == 7
        assert record["order"][row][:3] == [0] * 3 and record["probability"][row][:3] == [None] * 3
        assert sorted(record["order"][row][3:5]) == [2, 3] or record["order"][row][3] == 1
    assert record["texts"] == bd3_ds.load(str(place / BD3)).generate(2, 7, "3 1", seed=9, stop=())
    wrongs = (["--num", "0"], ["--nucleus", "2"], ["--lenght", "3"], ["--temperature", "warm"], ["--stop", "end"])
    for wrong in (*wrongs, ["--prompts", "nowhere"], ["--prompts", str(file), "--prompt", "1"]):
        with pytest.raises(UserError):
            sample_command.main([*words[:1], *wrong])
