"""Log-likelihoods and continuations as benchmarks ask for them; with lm_eval, through its own evaluator."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend

from bd3_ds.commands import convert as convert_command
from bd3_ds.commands import harness as harness_command
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.data.streaming_import import import_streaming
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.evaluation import token_scores
from bd3_ds.evaluation.api import LanguageModel, load
from bd3_ds.evaluation.harness import continuations
from bd3_ds.evaluation.harness import lm_eval as harness
from bd3_ds.evaluation.harness.continuations import Continuations
from bd3_ds.evaluation.harness.greedy import is_greedy
from bd3_ds.evaluation.text_windows import TextWindows
from bd3_ds.runtime.errors import UserError, run_command
from tests.helpers.tiny import LENGTH, tiny_export, tiny_run, tiny_text

SIZE = 4
# Pairs that fit, that have no context, whose context is cut, and whose continuation takes several windows.
PAIRS = [
    ("The value", " of the name"),
    ("", "The value of it"),
    ("a " * 40, "list of it"),
    ("it is ", "a module " * 9),
    ("  ", " it"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("harness")
    found = {}
    for objective in OBJECTIVES:
        size = SIZE if objective == BD3 else None
        run = tiny_run(root, objective__name=objective, objective__block_size=size, run_dir=str(root / objective))
        found[objective] = tiny_export(run)
    return found


@pytest.fixture(scope="module")
def models(places: dict[str, Path]) -> dict[str, LanguageModel]:
    return {objective: load(str(place)) for objective, place in places.items()}


def likelihood(model: LanguageModel, tokens: list[int], given: int, **how: Any) -> float:
    """By `score` alone, of one text that fits."""
    row = torch.tensor([tokens])
    return -float(model.score(row, scored=torch.arange(len(tokens))[None] >= given, **how).nelbo.sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_windows_score_each_token_once(models: dict[str, LanguageModel], objective: str) -> None:
    asked = Continuations(models[objective])
    grid = SIZE if objective == BD3 else 1
    for total in range(2, 60):
        for given in range(1, total):
            scored: list[int] = []
            windows = list(asked.pieces(list(range(total)), given))
            for window in windows:
                start, count = window.tokens[0], len(window.tokens)
                assert window.tokens == list(range(start, start + count)) and count <= LENGTH
                assert start % grid == 0 and 1 <= window.given < count
                scored += window.tokens[window.given :]
            assert scored == list(range(given, total))
            last = windows[-1]
            assert last.tokens[0] == 0 or len(last.tokens) > LENGTH - grid  # as much context as there is room
            assert len(windows) <= 1 + (total - given) // (LENGTH - grid)


def test_rolling_windows_are_lm_evals() -> None:
    """From lm_eval 0.4.13's docstring: BOS 0 1 2 -> 0 1 2 3, then 3 4 5 6 -> 4 5 6 7, then 5 6 7 8 -> 8 9."""
    windows = list(TextWindows(length=5, block_size=1).pieces([-1, *range(10)], 1))
    assert [window.tokens for window in windows] == [[-1, 0, 1, 2, 3], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
    assert [window.given for window in windows] == [1, 1, 3]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loglikelihood_is_the_score_of_what_is_not_given(models: dict[str, LanguageModel], objective: str) -> None:
    model = models[objective]
    how = {"estimator": "mc", "views": 64} if objective == SEDD else {"estimator": "exact"}
    asked = Continuations(model, **how)
    answers = asked.loglikelihood(PAIRS[:2])
    for number, (pair, (value, _)) in enumerate(zip(PAIRS, answers, strict=False)):
        tokens, given = asked.encode_pair(*pair)
        assert tokens[0] == model.tokenizer.bos_id and len(tokens) <= LENGTH
        if objective == SEDD:  # noise goes by the number of the row among those of its length
            values = [likelihood(model, tokens, given, **how, first_row=row) for row in range(2)]
            assert min(abs(value - other) for other in values) < 1e-4, number
        else:
            assert value == pytest.approx(likelihood(model, tokens, given, **how), rel=1e-5)
            assert value < 0


def test_the_likelihood_of_a_text_is_that_of_its_parts(models: dict[str, LanguageModel]) -> None:
    asked = Continuations(models[AR])
    (value, _), (begin, _) = asked.loglikelihood([("The value", " of it"), ("", "The value")])
    assert value + begin == pytest.approx(asked.loglikelihood_rolling(["The value of it"])[0], rel=1e-5)
    assert asked.loglikelihood_rolling([""]) == [0.0] and asked.loglikelihood([("it", "")]) == [(0.0, True)]


@pytest.mark.parametrize("objective", [AR, BD3])
def test_long_texts_are_scored_in_windows(models: dict[str, LanguageModel], objective: str) -> None:
    """Each window by `score` alone; a cut context leaves the blocks of the continuation what they were."""
    model = models[objective]
    asked = Continuations(model, estimator="exact")
    text = " ".join(tiny_text())[:200]
    tokens = [model.tokenizer.bos_id, *model.tokenizer.encode_batch([text])[0]]
    windows = list(asked.pieces(tokens, 1))
    assert len(windows) > 3
    expected = sum(likelihood(model, window.tokens, window.given, estimator="exact") for window in windows)
    assert asked.loglikelihood_rolling([text])[0] == pytest.approx(expected, rel=1e-5)
    long, _ = asked.loglikelihood([(text, " it is")])[0]
    tokens, given = asked.encode_pair(text, " it is")
    start = len(tokens) - LENGTH
    start += -start % (SIZE if objective == BD3 else 1)
    assert long == pytest.approx(likelihood(model, tokens[start:], given - start, estimator="exact"), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_answers_do_not_depend_on_batching(
    models: dict[str, LanguageModel], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Continuations(models[objective], estimator=None if objective != BD3 else "stratified", views=3, seed=7)
    texts = [" ".join(pair) for pair in PAIRS]
    requests = [(text, {"max_gen_toks": 5, "do_sample": True}) for text in texts]
    told: list[int] = []
    whole = (
        asked.loglikelihood(PAIRS, told.append),
        asked.loglikelihood_rolling(texts, told.append),
        asked.generate_until(requests, told.append),
    )
    assert sum(told) == 3 * len(PAIRS)
    monkeypatch.setattr(continuations, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(token_scores, "TOKENS_AT_ONCE", 3 * LENGTH)
    for (value, greedy), (other, again) in zip(whole[0], asked.loglikelihood(PAIRS), strict=True):
        assert value == pytest.approx(other, rel=1e-5) and greedy == again
    assert asked.loglikelihood_rolling(texts) == pytest.approx(whole[1], rel=1e-5)
    assert asked.generate_until(requests) == whole[2]
    if objective != AR:  # most blocks have more masks than views
        asked.seed = 8
        assert asked.loglikelihood_rolling(texts) != pytest.approx(whole[1], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "total", "given", "most"),
    [(BD3, 8, 6, 2), (BD3, 8, 5, 3), (BD3, 12, 7, 4), (MDLM, 8, 6, 2), (MDLM, 8, 1, 7), (BD3, 8, 1, 4)],
)
def test_few_tokens_are_exact(
    models: dict[str, LanguageModel], objective: str, total: int, given: int, most: int
) -> None:
    """As long as the block with most scored tokens has no more masks than there are views."""
    (piece,) = Continuations(models[objective]).pieces([0] * total, given)
    for views, name in ((2**most - 1, "exact"), (2**most - 2, "stratified")):
        assert Continuations(models[objective], views=views)._estimator(piece) == name
    assert Continuations(models[objective], estimator="mc")._estimator(piece) == "mc"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_greedy_is_what_the_sampler_writes(models: dict[str, LanguageModel], objective: str) -> None:
    """Greedy texts, cut inside a block too, and the same with one token changed."""
    model = models[objective]
    size = SIZE if objective == BD3 else 1 if objective == AR else LENGTH
    generator = torch.Generator().manual_seed(0)
    for given, total in ((5, LENGTH), (1, LENGTH), (6, 11)):
        prompt = torch.randint(3, 60, (6, given), generator=generator)
        how = {} if objective == AR else {"tokens_per_step": 1}
        x0 = model.sample(6, total, prompt, temperature=0.0, **how).tokens
        changed = x0.clone()
        place = torch.randint(given, total, (6, 1), generator=generator)
        changed.scatter_(1, place, (changed.gather(1, place) + 1) % 60)
        scored = (torch.arange(total) >= given).expand(6, -1)
        block = total if objective in (MDLM, SEDD) else size
        missing = -total % block
        for tokens, right in ((x0, True), (changed, False)):
            filled = torch.nn.functional.pad(tokens, (0, missing), value=model.mask_id)
            where = torch.nn.functional.pad(scored, (0, missing))
            found = is_greedy(model.network, objective, filled, where, block, model.mask_id)
            assert found.tolist() == [right] * 6


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_generate_until(models: dict[str, LanguageModel], objective: str) -> None:
    model = models[objective]
    asked = Continuations(model)
    contexts = ["The va", "it", "a " * 40]
    texts = asked.generate_until([(context, {"max_gen_toks": 6}) for context in contexts])
    assert texts == [asked.generate_until([(context, {"max_gen_toks": 6})])[0] for context in contexts]
    tokens = [model.tokenizer.bos_id, *model.tokenizer.encode_batch(["The va"])[0]]
    how = {} if objective == AR else {"tokens_per_step": 1}
    row = model.sample(1, len(tokens) + 6, [tokens], temperature=0.0, stop=("eos",), **how)
    written = model.tokenizer.decode(row.tokens[0, : row.lengths[0]].tolist())
    assert len(tokens) <= LENGTH - 6 and written == "The va" + texts[0]
    # Cut at the first of two texts, wherever it stands.
    letter = texts[0][len(texts[0]) // 2]
    cut = asked.generate_until([(contexts[0], {"max_gen_toks": 6, "until": [letter, "nowhere"]})])[0]
    assert cut == texts[0][: texts[0].index(letter)]
    assert asked.generate_until([(contexts[0], {"max_gen_toks": 6, "until": letter})]) == [cut]
    drawn = [asked.generate_until([("it", {"max_gen_toks": 9, "temperature": 1.0})] * 2) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def test_mistakes_are_the_users(models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models[BD3]
    for options, sentence in (
        ({"views": 0}, "views=0"),
        ({"seed": -1}, "seed=-1"),
        ({"treshold": 0.9}, "did you mean 'threshold'"),
        ({"threshold": 2}, "threshold=2"),
    ):
        with pytest.raises(UserError, match=sentence):
            Continuations(model, **options)
    with pytest.raises(UserError, match="did you mean 'exact'"):
        Continuations(model, estimator="exakt").loglikelihood(PAIRS)
    for wish, sentence in (
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"best_of": 2}, "best_of is no option"),
    ):
        with pytest.raises(UserError, match=sentence):
            Continuations(model).generate_until([("it", wish)])
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(UserError, match="no tokenizer"):
        Continuations(model)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harness.harness_model.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert run_command(harness_command.main, ["--model", "bd3"]) == 2
    assert "pip install -r requirements-extra.txt" in capsys.readouterr().err


def test_causal_models_score_as_lm_evals_own(tmp_path: Path) -> None:
    """A GPT-2 with random weights, once through lm_eval's class for transformers, once converted, through ours."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-extra.txt)")
    pytest.importorskip("accelerate", reason="accelerate is not installed, without which lm_eval runs no transformers")
    import_streaming()  # which mends torchvision, that transformers imports too
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    symbols, place = 40, tmp_path / "gpt2"
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, vocab_size=symbols + 1)
    gpt2 = transformers.GPT2LMHeadModel(config)
    for parameter in gpt2.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.3)
    gpt2.save_pretrained(place)
    number_tokenizer(symbols).save(tmp_path / "tokenizer")
    convert_command.convert_causal(place, tmp_path / "export", str(tmp_path / "tokenizer"))
    settings = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    end = "<end of text>"
    single = [{"SpecialToken": {"id": end, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {end: {"id": end, "ids": [symbols], "tokens": [end]}}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": special,
    }
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(json.dumps(settings)), bos_token=end, eos_token=end, pad_token=end
    )
    # Its windows hold one token more than the positions that it is told of, ours no more than the model's.
    theirs = HFLM(gpt2, tokenizer=tokenizer, add_bos_token=True, max_length=LENGTH - 1, device="cpu", batch_size=1)
    ours = harness.harness_model()(export=str(tmp_path / "export"), device="cpu")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(str(rng.randrange(symbols)) for _ in range(count))

    pairs = [(words(rng.randrange(1, 22)), " " + words(rng.randrange(1, 8))) for _ in range(20)]
    pairs += [("", words(5)), (words(3) + " ", words(2))]
    greedy = ours.continuations.generate_until([(context, {"max_gen_toks": 2}) for context, _ in pairs[:5]])
    pairs += [(context, text) for (context, _), text in zip(pairs, greedy, strict=False)]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (value, right), (other, other_right) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True
    ):
        assert value == pytest.approx(other, rel=1e-4) and right == other_right
    texts = [Instance("loglikelihood_rolling", {}, (words(count),), 0) for count in (3, 15, 16, 40, 61)]
    # With add_bos_token its rolling windows would begin with two of them.
    theirs.add_bos_token = False
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)


def test_in_lm_eval(places: dict[str, Path], models: dict[str, LanguageModel], tmp_path: Path) -> None:
    """All three kinds of request through its evaluator, from a task file on disk."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-extra.txt)")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    harness.harness_model()
    lines = [{"text": part[:60]} for part in tiny_text()[:6] if len(part) > 60]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}},
        "test_split": "test",
    }
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    tasks = {
        "loglikelihood": {
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [perplexity, accuracy],
        },
        "loglikelihood_rolling": {
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "generate_until": {
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    configs: list[Any] = [{"task": f"tiny_{k}", "output_type": k, **common, **own} for k, own in tasks.items()]
    found = simple_evaluate(
        model="bd3",
        model_args={"export": str(places[BD3]), "views": 4},
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    asked = Continuations(models[BD3], views=4)
    pairs = [(line["text"].rpartition(" ")[0], " " + line["text"].rpartition(" ")[2]) for line in lines]
    answers = asked.loglikelihood(pairs)
    mean = sum(value for value, _ in answers) / len(lines)
    results = found["results"]
    assert results["tiny_loglikelihood"]["perplexity,none"] == pytest.approx(torch.tensor(-mean).exp().item(), rel=1e-4)
    bits = -sum(asked.loglikelihood_rolling([line["text"] for line in lines])) / torch.tensor(2.0).log().item()
    count = sum(len(line["text"].encode()) for line in lines)
    assert results["tiny_loglikelihood_rolling"]["bits_per_byte,none"] == pytest.approx(bits / count, rel=1e-4)
    assert results["tiny_generate_until"]["exact_match,none"] == 0
    samples = [sample["resps"][0][0] for sample in found["samples"]["tiny_generate_until"]]
    assert samples == asked.generate_until([(line["text"], {"until": ["."], "max_gen_toks": 4}) for line in lines])


def test_a_device_that_is_there_unless_one_is_named():
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert harness.with_device(["--model", "bd3"]) == ["--model", "bd3", "--device", here]
    for words in (["--model", "bd3", "--device", "cuda:1"], ["--model=bd3", "--device=cpu"], ["ls", "tasks"]):
        assert harness.with_device(words) == words
