"""`run.py quality`: perplexity under a judge against plain loops, counts by hand, and what is said of bad input."""

import importlib.util
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import bd3_ds
from bd3_ds.checkpoint.export import write_export
from bd3_ds.commands import convert as convert_command
from bd3_ds.commands import denoising as denoising_command
from bd3_ds.commands import quality as quality_command
from bd3_ds.commands import sample as sample_command
from bd3_ds.config.load import load_defaults
from bd3_ds.config.schema import AR, BD3
from bd3_ds.data.streaming_import import stub_torchvision
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.diffusion.subs import subs_log_probs
from bd3_ds.evaluation.text import quality
from bd3_ds.evaluation.text.gen_ppl import Scores, Windows, fit_windows, open_judge, score_rows, text_features
from bd3_ds.evaluation.text.quality import Quality, mauve_score, sampling_figures
from bd3_ds.evaluation.text.statistics import distinct, entropy, lengths, mean_and_stderr, ratio_and_stderr
from bd3_ds.model.build import dit_config
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.runtime.samples import read_samples
from benchmarks import generation_tables
from data_prep.pack_writer import write_pack
from tests.helpers.tiny import tiny_tokenizer

stub_torchvision()
import transformers  # noqa: E402

WORDS = [f"w{i}" for i in range(30)]
END = "<|endoftext|>"
CONTEXT, LENGTH, SYMBOLS = 16, 12, 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """gpt2 and bert: random Hugging Face models with tokenizers; ar, bd3 and mute: exports of ours."""
    root = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({END: 0, "?": 1} | {w: i + 2 for i, w in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    sizes = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2Config(n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, **sizes)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **sizes
    )
    transformers.BertLMHeadModel(bert).save_pretrained(root / "bert")
    for name in ("gpt2", "bert"):
        words.save_pretrained(root / name)
    number_tokenizer(SYMBOLS).save(root / "tokenizer")
    for name, objective in {"ar": AR, "bd3": BD3, "mute": AR}.items():
        values = {
            "run_dir": "unused",
            "data.train": "unused",
            "data.length": LENGTH,
            "objective.name": objective,
            "objective.block_size": 2 if objective == BD3 else None,
            "model.vocab_size": SYMBOLS + 2,
            "model.mask_id": SYMBOLS + 1,
            "model.hidden_size": 16,
            "model.layers": 2,
            "model.heads": 2,
            "model.cond_size": 8,
        }
        run = load_defaults(values, "the test")
        shapes = DiT(dit_config(run.model, objective)).state_dict()
        weights = {key: torch.randn(tensor.shape) * 0.3 for key, tensor in shapes.items()}
        write_export(root / name, weights, run, None if name == "mute" else root / "tokenizer", step=7)
    return root


@pytest.fixture(scope="module")
def gpt2(root):
    return open_judge(str(root / "gpt2"), CPU)


def texts(count=5, seed=0, longest=40):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, longest))) for _ in range(count)]


def numbers(count=3, tokens=LENGTH - 1, seed=0):
    draw = random.Random(seed)
    return [" ".join(str(draw.randrange(SYMBOLS)) for _ in range(tokens)) for _ in range(count)]


def samples_of(written, **changes):
    """A samples file's object about these texts: one token a word behind a given BOS, one evaluation each."""
    count = [len(text.split()) for text in written]
    ids = [[0, *(int(word.strip("w")) + 2 for word in text.split())] for text in written]
    return {
        "export": "step-00000007",
        "run": "runs/x",
        "objective": "bd3",
        "block_size": 4,
        "step": 7,
        "length": 64,
        "seed": 0,
        "options": {"temperature": 1.0},
        "given": [1] * len(written),
        "texts": written,
        "token_ids": ids,
        "pieces": [["<s>", *text.split()] for text in written],
        "ended": ["length"] * len(written),
        "nfe": count,
        "cache_forwards": [-(-n // 4) for n in count],
        "order": [list(range(n + 1)) for n in count],
        "probability": [[None, *[0.5] * n] for n in count],
        "seconds": 1.0,
        "tokens": sum(count),
        "tokens_per_second": float(sum(count)),
    } | changes


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def plain_nats(model, ids, size, stride, end=None):
    """Nats and number of the scored tokens of `ids`: one pass a token, over exactly the tokens that it is given."""
    nats, scored = 0.0, 0
    for place in range(1, len(ids)):
        begin = 0
        while place >= begin + size:  # the first window that holds the place
            begin += stride
        if ids[place] != end:
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[ids[place]])
            scored += 1
    return nats, scored


@pytest.mark.parametrize(("size", "stride"), [(16, 8), (16, 15), (5, 1), (7, 3), (2, 1)])
@torch.no_grad()
def test_gpt2_as_judge_is_a_plain_loop_over_tokens(root, gpt2, size, stride):
    """Texts shorter and longer than the window, one with an EOS in it, one too short to be scored."""
    model = transformers.GPT2LMHeadModel.from_pretrained(root / "gpt2").eval()
    written = [*texts(), f"w1 w2 {END} w3 w4", "w5", ""]
    rows = gpt2.encode(written)
    assert rows[5] == [3, 4, 0, 5, 6] and gpt2.end == 0 and gpt2.first is None
    assert min(map(len, rows[:5])) < 16 < max(map(len, rows[:5])), "lengths on both sides of the window"
    scores = score_rows(gpt2, rows, Windows(size, stride))
    expected = [plain_nats(model, row, size, stride, end=0) for row in rows]
    assert scores.scored == [scored for _, scored in expected] and scores.scored[5:] == [3, 0, 0]
    assert scores.nats == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    own = [math.exp(nats / scored) for nats, scored in expected if scored]
    found = scores.summary()
    assert found["mean_ppl"] == pytest.approx(sum(own) / 6, rel=1e-5) and found["scored_texts"] == 6
    total = sum(nats for nats, _ in expected) / sum(scored for _, scored in expected)
    assert found["ppl"] == pytest.approx(math.exp(total), rel=1e-5)
    assert found["ppl"] != pytest.approx(found["mean_ppl"], rel=1e-3)
    other = score_rows(gpt2, rows, Windows(16, 1))
    assert other.nats != pytest.approx(scores.nats, rel=1e-4) or (size, stride) == (16, 1)


def test_every_token_is_scored_once_with_its_context():
    for tokens in range(2, 60):
        for size, stride in ((8, 4), (8, 1), (8, 7), (20, 13)):
            context = {}
            for begin, end, first in Windows(size, stride).of(tokens):
                assert 0 <= begin < first < end <= tokens and end - begin <= size
                for place in range(first, end):
                    assert place not in context
                    context[place] = place - begin
            assert sorted(context) == list(range(1, tokens))
            assert all(seen >= min(place, size - stride) for place, seen in context.items())
    assert Windows(8, 4).of(1) == Windows(8, 4).of(0) == []


def test_batches_do_not_matter(gpt2, monkeypatch):
    rows = gpt2.encode(texts(9))
    together = score_rows(gpt2, rows, Windows(16, 8))
    monkeypatch.setattr("bd3_ds.evaluation.text.gen_ppl.TOKENS_AT_ONCE", 1)
    assert score_rows(gpt2, rows, Windows(16, 8)).nats == pytest.approx(together.nats, rel=1e-5)


def test_an_export_as_judge_is_its_own_score(root):
    """BOS stands first and is given; within the window the nats are those of `score`."""
    judge = open_judge(str(root / "ar"), CPU)
    model = bd3_ds.load(str(root / "ar"))
    rows = judge.encode(numbers())
    assert {len(row) for row in rows} == {LENGTH - 1} and judge.first == model.tokenizer.bos_id
    scores = score_rows(judge, rows, fit_windows(1024, 512, judge.context))
    expected = model.score([[judge.first, *row] for row in rows]).nelbo.sum(1)
    assert scores.nats == pytest.approx(expected.tolist(), rel=1e-5)
    assert scores.scored == [LENGTH - 1] * 3
    assert fit_windows(1024, 512, judge.context) == Windows(LENGTH, LENGTH // 2)
    # Longer than its context: windows of 12 tokens, each six behind the last, the text's BOS in the first alone.
    (long,) = judge.encode(numbers(1, 30))
    framed = [judge.first, *long]
    passes = [model.logits([framed[begin : begin + 12]])[0] for begin in (0, 6, 12, 18, 24)]
    logs = [subs_log_probs(logits, model.mask_id).double() for logits in passes]
    nats = 0.0
    for place in range(1, 31):
        window = max(0, -(-(place - 11) // 6))
        nats -= float(logs[window][place - 6 * window - 1][framed[place]])
    assert score_rows(judge, [long], Windows(LENGTH, 6)).nats[0] == pytest.approx(nats, rel=1e-5)


def test_a_judge_with_a_bos_of_its_own(root, tmp_path):
    """A tokenizer that sets BOS before texts: it stands before each and is not scored."""
    from tokenizers.processors import TemplateProcessing

    transformers.GPT2LMHeadModel.from_pretrained(root / "gpt2").save_pretrained(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(root / "gpt2")
    words._tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    words.save_pretrained(tmp_path)
    judge = open_judge(str(tmp_path), CPU)
    assert judge.first == 0 and judge.encode(["w1 w2"]) == [[3, 4]]
    scores = score_rows(judge, [[3, 4]], Windows(16, 8))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert scores.nats[0] == pytest.approx(plain_nats(model, [0, 3, 4], 16, 8)[0], rel=1e-5)
    assert scores.scored == [2]


@torch.no_grad()
def test_features_are_the_last_tokens_hidden_state(root, gpt2):
    rows = gpt2.encode(["w1 w2 w3", "", " ".join(WORDS)])
    features = text_features(gpt2, rows, Windows(16, 8))
    model = transformers.GPT2LMHeadModel.from_pretrained(root / "gpt2").eval()
    last = [model(torch.tensor([row[:16]]), output_hidden_states=True).hidden_states[-1][0, -1] for row in rows if row]
    torch.testing.assert_close(features, torch.stack(last))
    ours = open_judge(str(root / "ar"), CPU)
    hidden = text_features(ours, [[1, 2, 3]], Windows(12, 6))
    logits = ours._network.head.linear(hidden)[0, : SYMBOLS + 2]
    torch.testing.assert_close(logits, bd3_ds.load(str(root / "ar")).logits([[ours.first, 1, 2, 3]])[0, -1])


def test_counts_by_hand():
    assert entropy([7, 7, 7]) == 0 == entropy([])
    assert entropy("aabc") == pytest.approx(1.5 * math.log(2))
    assert entropy(range(10)) == pytest.approx(math.log(10))
    two = ["a b a b", "a b c"]  # words a b a b a b c; pairs ab ba ab, ab bc; triples aba bab, abc; abab
    assert [distinct(two, n) for n in (1, 2, 3, 4, 5)] == [3 / 7, 3 / 5, 1, 1, None]
    assert lengths([3, 9, 4, 4]) == {"median": 4, "mean": 5, "max": 9}
    assert mean_and_stderr([1.0, 3.0]) == (2.0, pytest.approx(1.0)) and mean_and_stderr([4.0]) == (4.0, None)
    assert mean_and_stderr([]) == (None, None)
    ratio, stderr = ratio_and_stderr([2.0, 2.0, 8.0], [1.0, 1.0, 2.0])
    assert ratio == 3 and stderr == pytest.approx(math.sqrt((1 + 1 + 4) * 3 / 2) / 4)
    assert ratio_and_stderr([2.0, 4.0, 6.0], [1, 2, 3]) == (2, 0)


def test_what_the_sampler_took():
    """Row 0 ends with an EOS that it wrote; row 1 has a given token in its middle."""
    samples = samples_of(
        ["w1", "w2"],
        token_ids=[[0, 5, 5, 6, 0], [0, 5, 9, 5]],
        order=[[0, 2, 1, 3, 4], [0, 1, 0, 2]],
        ended=["eos", "length"],
        nfe=[4, 2],
        cache_forwards=[1, 2],
    )
    figures = sampling_figures(samples)
    assert figures["tokens"] == {"median": 2.5, "mean": 2.5, "max": 3}  # 5 5 6 and 5 5
    assert figures["own_entropy"] == pytest.approx(entropy([5, 5, 6]) / 2)
    assert figures["ended"] == {"eos": 0.5, "entropy": 0, "length": 0.5, "interrupted": 0}
    assert (figures["nfe"], figures["nfe_with_cache"]) == (3, 4.5)
    assert figures["tokens_per_evaluation"] == 1 and figures["tokens_per_forward"] == pytest.approx(6 / 9)


def test_the_command(root, tmp_path, capsys):
    written = texts(6)
    first = write(tmp_path / "a.json", samples_of(written))
    second = write(tmp_path / "b.json", samples_of([text + " w1 w1" for text in written], ended=["eos"] * 6))
    reference = tmp_path / "real.jsonl"
    reference.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts(4, seed=5)))
    words = [first, second, "--judge", str(root / "gpt2"), "--reference", str(reference)]
    assert quality_command.main([*words, "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert "windows of 16 tokens, stride 8 (asked: 1024, 512)" in out
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["file"] for record in records] == [first, second, reference.as_posix()]
    assert records[0]["judge"]["window"] == 16 and records[0]["judge"]["window_asked"] == 1024
    judge = open_judge(str(root / "gpt2"), CPU)
    expected = score_rows(judge, judge.encode(written), Windows(16, 8)).summary()
    assert {key: records[0][key] for key in expected} == expected
    assert records[0]["entropy"] == pytest.approx(sum(map(entropy, judge.encode(written))) / 6)
    assert records[0]["own_entropy"] == pytest.approx(records[0]["entropy"])  # here a token is a word for both
    assert records[2]["judge_tokens"]["max"] == max(len(text.split()) for text in texts(4, seed=5))
    assert "nfe" not in records[2]
    lines = out.splitlines()
    assert len(lines) == 5 and f"{expected['ppl']:.2f} ± {expected['ppl_stderr']:.2f}" in lines[2]
    assert "100%" in lines[3] and "MAUVE is left out" in err


def test_ctrl_c_keeps_the_files_that_are_judged(root, tmp_path, capsys, monkeypatch):
    files = [write(tmp_path / f"{name}.json", samples_of(texts(6, seed=seed))) for seed, name in enumerate("ab")]
    file = tmp_path / "out.json"
    judged = quality.score_rows

    def stop_at_the_second(*words):
        if file.exists():
            raise KeyboardInterrupt
        return judged(*words)

    monkeypatch.setattr(quality, "score_rows", stop_at_the_second)
    assert quality_command.main([*files, "--judge", str(root / "gpt2"), "--json", str(file)]) == 130
    out, err = capsys.readouterr()
    (record,) = json.loads(file.read_text())
    assert record["file"] == files[0] and f"{record['ppl']:.2f}" in out
    assert err.splitlines()[-1] == f"stopped: 1 of 2 files are judged; kept in {file}"


def test_a_folder_of_ours_judges_as_its_export_does(root, tmp_path):
    assert convert_command.main(["--from", "export", "--to", "hf", str(root / "ar"), str(tmp_path / "hf")]) == 0
    rows = numbers()
    judges = [open_judge(str(place), CPU) for place in (root / "ar", tmp_path / "hf")]
    ours, theirs = (score_rows(judge, judge.encode(rows), Windows(LENGTH, 4)) for judge in judges)
    assert ours == theirs and sum(ours.scored) > 0


@pytest.mark.parametrize("name", ["ar", "bd3"])
def test_what_the_sampler_writes_is_read(root, tmp_path, capsys, name):
    """From an export to both the figures and the page, by the commands alone."""
    path, page = tmp_path / "samples.json", tmp_path / "page.html"
    assert sample_command.main([str(root / name), "--num", "3", "--stop", "none", "--json", str(path)]) == 0
    assert quality_command.main([str(path), "--judge", str(root / "ar"), "--json", str(tmp_path / "out.json")]) == 0
    assert denoising_command.main([str(path), "--out", str(page)]) == 0
    (record,) = json.loads((tmp_path / "out.json").read_text())
    written = LENGTH - 1
    assert record["tokens"] == {"median": written, "mean": written, "max": written}
    assert record["nfe"] == written and record["tokens_per_evaluation"] == 1
    assert record["nfe_with_cache"] > written or name == "ar"
    assert page.read_text().count('data-o="') == 3 * LENGTH


def test_texts_may_be_cut(root, gpt2):
    """--truncate: as many of the judge's tokens as a sample may have."""
    samples = samples_of(texts(4), length=5)
    record, reading = Quality(gpt2, cut=True).of_samples(samples)
    assert max(map(len, reading.rows)) == 5 == record["judge_tokens"]["max"] and record["judge"]["cut_to"] == 5
    assert record["scored_tokens"] == sum(len(row) - 1 for row in reading.rows)
    whole, _ = Quality(gpt2).of_samples(samples)
    assert whole["judge_tokens"]["max"] > 5 and whole["judge"]["cut_to"] is None


def test_mauve(monkeypatch):
    """Same texts: nearly 1; texts far apart: nearly 0; without the package a sentence."""
    if importlib.util.find_spec("mauve") is not None:
        generator = torch.Generator().manual_seed(0)
        one, other = torch.randn(2, 60, 8, generator=generator)
        assert mauve_score(one, other) > 0.5 > 0.1 > mauve_score(one, other + 20)
        assert mauve_score(one[:10], other) is None
    monkeypatch.setitem(__import__("sys").modules, "mauve", None)
    with pytest.raises(UserError, match=r"requirements-extra\.txt"):
        quality.mauve_score(torch.zeros(30, 2), torch.zeros(30, 2))


def test_empty_texts_are_counted_and_left_out(gpt2):
    record, _ = Quality(gpt2).of_samples(samples_of(["", "w1 w2 w3"]))
    assert (record["texts"], record["empty_texts"], record["scored_texts"]) == (2, 1, 1)
    assert record["ppl_by_text"][0] is None and record["ppl"] == pytest.approx(record["ppl_by_text"][1])
    assert record["ppl_stderr"] is None


def fails(capsys, *words):
    """The sentence on stderr of a command that must end with 2."""
    assert run_command(quality_command.main, list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_judges_that_are_none(root, tmp_path, capsys):
    samples = write(tmp_path / "a.json", samples_of(texts()))
    assert "there is no such directory" in fails(capsys, samples, "--judge", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "holds no judge" in fails(capsys, samples, "--judge", str(tmp_path / "empty"))
    assert "not causal" in fails(capsys, samples, "--judge", str(root / "bert"))
    assert "objective.name=bd3" in fails(capsys, samples, "--judge", str(root / "bd3"))
    assert "no tokenizer" in fails(capsys, samples, "--judge", str(root / "mute"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (root / "gpt2").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((root / "gpt2" / "model.safetensors").read_bytes()[:1000])
    assert "cannot be loaded" in fails(capsys, samples, "--judge", str(broken))
    (broken / "model.safetensors").write_bytes((root / "bert" / "model.safetensors").read_bytes())
    assert "lacks weights" in fails(capsys, samples, "--judge", str(broken))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (broken / file).unlink()
    assert "tokenizer" in fails(capsys, samples, "--judge", str(broken))


def test_the_hub_out_of_reach(tmp_path, capsys, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_words, **_options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    samples = write(tmp_path / "a.json", samples_of(texts()))
    line = fails(capsys, samples)
    assert "--judge gpt2-large" in line and "cannot be reached" in line and "objective.name=ar" in line


def test_windows_that_cannot_be(root, tmp_path, capsys):
    samples = write(tmp_path / "a.json", samples_of(texts()))
    judge = (samples, "--judge", str(root / "gpt2"))
    assert "--window 1 " in fails(capsys, *judge, "--window", "1")
    assert "--stride 8 " in fails(capsys, *judge, "--window", "8", "--stride", "8")
    assert "above 0" in fails(capsys, *judge, "--stride", "0")
    with pytest.raises(UserError, match="reads 1 token"):
        fit_windows(16, 8, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"order": None}, "lacks the list 'order'"),
        ({"texts": []}, "'texts' has 0 entries"),
        ({"nfe": [3]}, "'nfe' has 1 entries for 2 texts"),
        ({"ended": ["eos", "bored"]}, "'ended' holds 'bored'"),
        ({"token_ids": [[0, 3], [0]]}, "text 0 are not lists of one length"),
        ({"block_size": 0}, "'block_size' is 0"),
        ({"probability": [[None, 0.5, 1.5], [None, 0.5, 0.5]]}, "holds 1.5"),
    ],
)
def test_sample_files_that_are_not_ours(tmp_path, change, sentence):
    path = tmp_path / "a.json"
    write(path, samples_of(["w1 w2", "w3 w4"], **change))
    with pytest.raises(UserError, match=sentence):
        read_samples(path)


def test_sample_files_that_are_damaged(root, tmp_path, capsys):
    judge = ("--judge", str(root / "gpt2"))
    whole = json.dumps(samples_of(texts()))
    path = tmp_path / "a.json"
    path.write_text(whole[: len(whole) // 2])
    assert "not valid JSON" in fails(capsys, str(path), *judge)
    path.write_text("[1, 2]")
    assert "no JSON object" in fails(capsys, str(path), *judge)
    assert "not found" in fails(capsys, str(tmp_path / "b.json"), *judge)
    assert "is a directory" in fails(capsys, str(tmp_path), *judge)
    write(path, samples_of(["", ""]))
    line = fails(capsys, str(path), *judge)
    assert "no token to score" in line and "a.json" in line
    good = write(path, samples_of(texts()))
    reference = tmp_path / "real.jsonl"
    assert "--reference" in fails(capsys, good, *judge, "--reference", str(reference))
    reference.write_text('{"words": "x"}\n')
    assert 'line 1 has no "text"' in fails(capsys, good, *judge, "--reference", str(reference))
    reference.write_text('{"text": ')
    assert "line 1 is not JSON" in fails(capsys, good, *judge, "--reference", str(reference))
    reference.write_text("\n")
    assert "holds no text" in fails(capsys, good, *judge, "--reference", str(reference))


def test_summary_of_nothing():
    with pytest.raises(UserError, match="no token to score"):
        Scores([0.0], [0]).summary()


def test_the_tables(root, tmp_path, capsys):
    """Files of one model and length are one row; rows stand in the report's order; data come first."""
    run = tmp_path / "run"
    number_tokenizer(SYMBOLS).save(run / "exports" / "step-00000007" / "tokenizer")
    cases = [
        ("bd3", 4, 8, 0),
        ("bd3", 16, 8, 0),
        ("ar", 1, 8, 0),
        ("mdlm", 8, 8, 0),
        ("bd3", 16, 16, 0),
        ("bd3", 4, 8, 1),
    ]
    files = []
    for objective, size, length, seed in cases:
        written = texts(3, seed=10 * size + seed, longest=length)
        ended = ["eos", "length", "length"]
        values = samples_of(written, objective=objective, block_size=size, length=length, seed=seed, ended=ended)
        files.append(write(tmp_path / f"{len(files)}.json", values | {"run": str(run)}))
    data = tmp_path / "real.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(9, seed=5)))
    words = ["--judge", str(root / "gpt2"), "--threads", str(torch.get_num_threads())]
    words += ["--data", str(data), "--data-texts", "4", "--json", str(tmp_path / "out.json")]
    assert generation_tables.main([*files, *words]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "cpu"} <= record["machine"].keys()
    results = record["results"]
    found = [(row["model"], row["length"], row["texts"], row["seeds"]) for row in results["models"]]
    assert found == [
        ("AR", 8, 3, [0]),
        ("MDLM", 8, 3, [0]),
        ("BD3-LM L' = 16", 8, 3, [0]),
        ("BD3-LM L' = 16", 16, 3, [0]),
        ("BD3-LM L' = 4", 8, 6, [0, 1]),
    ]
    alone, _ = Quality(open_judge(str(root / "gpt2"), CPU), cut=True).of_samples(read_samples(Path(files[2])))
    assert results["models"][0]["ppl"] == pytest.approx(alone["ppl"])
    assert results["data"]["8"]["judge_tokens"]["max"] == 8 and results["data"]["8"]["texts"] == 4
    assert results["data_lengths"]["tokens"]["max"] == max(len(texts(9, seed=5)[at].split()) for at in (0, 2, 4, 6))
    first, second = (part.splitlines() for part in capsys.readouterr().out.split("\n\n")[-2:])
    assert [line.split("|")[1].strip() for line in first[2:]] == [
        "held-out text", "AR", "MDLM", "BD3-LM L' = 16", "BD3-LM L' = 4"
    ]  # fmt: skip
    assert f"{alone['ppl']:.2f} ± " in first[3] and first[3].count(" - ") == 5, "AR has no texts of 16 tokens"
    assert len(second) == 8 and second[3].split("|")[-2].strip() == "33%"


def test_tables_of_files_that_do_not_belong_together(root, tmp_path):
    def path(number, **changes):
        return Path(write(tmp_path / f"{number}.json", samples_of(texts(), **changes)))

    with pytest.raises(UserError, match="differ in 'options'"):
        generation_tables.grouped([path(0), path(1, seed=1, options={})])
    with pytest.raises(UserError, match="have one seed, 0"):
        generation_tables.grouped([path(0), path(1)])
    with pytest.raises(UserError, match="objective 'gan'"):
        generation_tables.grouped([path(0, objective="gan")])


def test_a_packs_documents(tmp_path):
    """What its EOS part, over the borders of chunks."""
    tokenizer = tiny_tokenizer()
    ids, end = tokenizer.encode_batch(["one document that is longer than a chunk", "two"]), tokenizer.eos_id
    stream = np.array([*ids[0], end, *ids[1], end, end, *ids[1]])
    chunks = stream[: len(stream) // 8 * 8].reshape(-1, 8)
    write_pack(tmp_path / "pack", ((row, np.array([0])) for row in chunks), tokenizer, 8, name="valid")
    documents = generation_tables.read_documents(tmp_path / "pack")
    assert documents[:2] == ["one document that is longer than a chunk", "two"] and len(ids[0]) > 8
    assert len(documents) <= 3 and all("two".startswith(text) for text in documents[2:])
