"""Perplexities of exports: estimators against each other and closed forms, records, and users' mistakes."""

import dataclasses
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from bd3_ds.checkpoint.export import find_export, load_weights, write_export
from bd3_ds.commands import evaluate as evaluate_command
from bd3_ds.commands import summary
from bd3_ds.config.check import estimator_used
from bd3_ds.data.pack import open_pack
from bd3_ds.diffusion.likelihood import Estimator, Texts
from bd3_ds.diffusion.score_entropy_bound import score_entropy_bound
from bd3_ds.evaluation import perplexity
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import evaluate_pack
from bd3_ds.evaluation.unigram import unigram_perplexity
from bd3_ds.evaluation.worker.cost import Pace, TooSlow, sample_flops, seconds_between_exports, set_flops
from bd3_ds.evaluation.worker.machine import idle_threads, most_free
from bd3_ds.evaluation.worker.worker import Worker
from bd3_ds.report.collect import collect
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.runtime.records import append as append_records
from bd3_ds.runtime.records import read as read_records
from bd3_ds.runtime.run_dir import EVALUATIONS, REPLACED
from tests.helpers.tiny import LENGTH, tiny_export, tiny_pack, tiny_run, tiny_tokenizer

CPU = torch.device("cpu")
VOCAB, MASK = 11, 10


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the packs train and valid, in which every test's runs are made."""
    directory = tmp_path_factory.mktemp("evaluation")
    tiny_run(directory)
    return directory


def export_of(place, name, **overrides):
    run = tiny_run(place, run_dir=place / name, **overrides)
    return find_export(str(tiny_export(run)))


def evaluate(export, place, **changes):
    options = {"estimator": "stratified", "views": 4, "batch": 16, "seed": 0, "max_chunks": None} | changes
    how = Estimator(options["estimator"], options["views"], options["seed"], options["batch"])
    return evaluate_pack(load_model(export, CPU), export, place / "valid", "valid", how, options["max_chunks"])


def test_sampled_estimators_agree_with_exact(place):
    export = export_of(place, "bd3")
    exact = evaluate(export, place, estimator="exact")
    assert exact["stderr"] == 0 and exact["forwards"] == 8 * (15 + 1)
    for estimator in ("stratified", "mc"):
        sampled = evaluate(export, place, estimator=estimator, views=64)
        assert 0 < sampled["stderr"] < 0.1 * exact["nelbo"]
        assert abs(sampled["nelbo"] - exact["nelbo"]) < 4 * sampled["stderr"] + 2e-3 * exact["nelbo"]


def test_record(place):
    export = export_of(place, "bd3")
    record = evaluate(export, place, max_chunks=5)
    assert {key: record[key] for key in ("export", "step", "set", "estimator", "tokens", "chunks", "views")} == {
        "export": "step-00000002",
        "step": 2,
        "set": "valid",
        "estimator": "stratified",
        "tokens": 5 * (LENGTH - 1),
        "chunks": 5,
        "views": 4,
    }
    assert record["ppl"] == math.exp(record["nelbo"])
    assert record["pack_hash"] == open_pack(place / "valid").manifest.pack_hash
    assert record["forwards"] == 5 * (4 + 1) and record["seconds"] > 0
    assert record["chunks_in_set"] == 8 and record["ppl_stderr"] == record["ppl"] * record["stderr"] > 0
    with pytest.raises(UserError, match="one view of one sequence tells nothing of its own error; give --views 2"):
        evaluate(export, place, views=1, max_chunks=1)


def test_batching_does_not_matter(place):
    export = export_of(place, "bd3")
    for estimator in ("exact", "stratified", "mc"):
        values = [
            evaluate(export, place, estimator=estimator, batch=batch, max_chunks=3)["nelbo"] for batch in (1, 8, 100)
        ]
        assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_autoregressive_is_its_cross_entropy(place):
    export = export_of(place, "ar", objective__name="ar", objective__block_size=None)
    record = evaluate(export, place, estimator="mc")
    x0 = torch.from_numpy(open_pack(place / "valid").all_tokens())
    logits = load_model(export, CPU)(x0, block_size=1).detach()
    logits[..., export.run.model.mask_id] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x0[:, 1:].flatten())
    assert record["estimator"] == "exact" and record["stderr"] == 0 and record["views"] is None
    assert record["nelbo"] == pytest.approx(expected.item(), rel=1e-5)


def test_full_diffusion_takes_sampled_estimators_alone(place):
    export = export_of(place, "mdlm", objective__name="mdlm", objective__block_size=None)
    assert evaluate(export, place)["forwards"] == 8 * 4
    one_view = evaluate(export, place, views=1)
    assert 0 < one_view["stderr"] < one_view["nelbo"]
    with pytest.raises(UserError, match="at most 4,096 tokens, not 4,097; use stratified"):
        estimator_used(export.run, "exact", "estimator", 4097)
    with pytest.raises(UserError, match="up to 16 tokens, and mdlm denoises all 32 tokens of a sequence together here"):
        wide = dataclasses.replace(export.run, data=dataclasses.replace(export.run.data, length=32))
        estimator_used(wide, "exact", "estimator", 100)
    blocks = dataclasses.replace(wide.objective, name="bd3", block_size=32)
    long = dataclasses.replace(wide, objective=blocks, data=dataclasses.replace(wide.data, length=64))
    with pytest.raises(UserError, match=r"tokens, and objective.block_size is 32; use stratified"):
        estimator_used(long, "exact", "estimator", 100)
    with pytest.raises(UserError, match="and 20 tokens of one block are to be scored; use stratified"):
        estimator_used(long, "exact", "estimator", 100, together=20)


@pytest.mark.slow
def test_sixteen_tokens_exactly(place):
    """All 32,767 masks of a block of 16, whose first token is given, agree with the estimate by strata."""
    export = export_of(place, "mdlm", objective__name="mdlm", objective__block_size=None)
    exact = evaluate(export, place, estimator="exact", max_chunks=1)
    sampled = evaluate(export, place, estimator="stratified", max_chunks=1, views=512)
    assert exact["stderr"] == 0 and exact["forwards"] == 2**15 - 1
    assert abs(exact["nelbo"] - sampled["nelbo"]) < 4 * sampled["stderr"]


def test_sedd_is_monte_carlo(place):
    export = export_of(place, "sedd", objective__name="sedd", objective__block_size=None, eval__estimator="mc")
    record = evaluate(export, place, estimator="mc", views=8)
    assert record["estimator"] == "mc" and math.isfinite(record["nelbo"]) and record["stderr"] > 0
    with pytest.raises(UserError, match="use mc"):
        evaluate(export, place, estimator="stratified")


def uniform_scores(x_t, sigma, at, read):
    return read.of_logits(torch.zeros(len(at), VOCAB))


def test_uniform_scores_cost_log_v_a_token():
    """With all ratios equal, the score entropy of a masked token is log(V - 1) at every time."""
    x0 = torch.randint(0, MASK, (4, 32), generator=torch.Generator().manual_seed(0))
    bound = score_entropy_bound(uniform_scores, Texts(x0), MASK, views=512, seed=1)
    error = bound.stderr.square().sum().sqrt()
    assert abs(bound.nelbo.sum() - 4 * 31 * math.log(VOCAB - 1)) < 4 * error
    assert bound.nelbo[:, 0].abs().max() == 0 and bound.forwards == 4 * 512
    assert error < 0.02 * bound.nelbo.sum()


def test_true_scores_cost_nothing():
    x0 = torch.randint(0, MASK, (2, 32), generator=torch.Generator().manual_seed(0))

    def scores(x_t, sigma, at, read):
        logits = torch.full((len(at), VOCAB), -1e4)
        truth = x0.repeat_interleave(4, dim=0).flatten()[at, None]
        return read.of_logits(logits.scatter(1, truth, math.log(VOCAB - 1)))

    assert score_entropy_bound(scores, Texts(x0), MASK, views=4, seed=0).nelbo.abs().max() < 1e-2


def test_stderr_of_sedd_is_the_spread_over_seeds():
    x0 = torch.zeros(1, 32, dtype=torch.long)
    draws = [score_entropy_bound(uniform_scores, Texts(x0), MASK, views=8, seed=seed) for seed in range(300)]
    spread = torch.stack([bound.nelbo.sum() for bound in draws]).std()
    stated = torch.stack([bound.variance.sum() for bound in draws]).mean().sqrt()
    assert 0.7 * spread < stated < 2 * spread


@pytest.mark.parametrize("limit", [None, 3])
def test_unigram_perplexity(place, limit):
    vocabulary = open_pack(place / "train").manifest.tokenizer.vocab_size
    seen = np.bincount(open_pack(place / "train").all_tokens().ravel(), minlength=vocabulary) + 1.0
    text = open_pack(place / "valid").all_tokens(limit)[:, 1:].ravel()
    share = seen / seen[:-1].sum()  # [MASK], the last token, is never scored
    expected = math.exp(-np.log(share[text]).mean())
    assert unigram_perplexity(place / "train", place / "valid", limit) == pytest.approx(expected, rel=1e-12)


def test_command(place, capsys):
    export = export_of(place, "bd3")
    tiny_pack(place / "packs" / "other", LENGTH, 4, seed=2)
    file = place / "out" / "records.json"
    words = ["--sets", f"valid,again={place / 'valid'},other", "--packs", str(place / "packs"), "--json", str(file)]
    assert evaluate_command.main([str(place / "bd3"), *words, "--estimator", "exact"]) == 0
    records = json.loads(file.read_text())
    assert [record["set"] for record in records] == ["valid", "again", "other"]
    assert records[0]["nelbo"] == records[1]["nelbo"] == evaluate(export, place, estimator="exact")["nelbo"]
    table = capsys.readouterr().out
    assert f"{records[2]['ppl']:.2f}" in table and records[2]["pack_hash"][:8] in table
    assert "perplexity = exp of a bound" in table and " ± " not in table.split("\n", 1)[1]  # exact, hence without


def test_figures_come_with_their_error_and_what_they_are_of(place, capsys):
    export = export_of(place, "bd3")
    file = place / "figures.json"
    assert evaluate_command.main([str(export.path), "--max-chunks", "3", "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())
    table = capsys.readouterr().out
    assert f"{record['ppl']:.2f} ± {record['ppl'] * record['stderr']:.2f}" in table
    assert "3 of 8" in table and "stratified, 4 views" in table
    assert evaluate_command.main([str(export_of(place, "ar", **AR_MODEL).path)]) == 0
    table = capsys.readouterr().out
    assert "perplexity by the likelihood itself" in table and "all 8  exact" in table


AR_MODEL = {"objective__name": "ar", "objective__block_size": None}


def begin_run(place, name, **overrides):
    """A run with its run.yaml and one export."""
    export = export_of(place, name, **overrides)
    run_dir = export.path.parent.parent
    (run_dir / "run.yaml").write_text((export.path / "config.yaml").read_text())
    return run_dir, export


def test_record_adds_to_the_records_of_the_run(place, capsys):
    """Beside a worker's: the newest stands, `report` reads it, a worker then has nothing left to do."""
    run_dir, _ = begin_run(place, "recorded", eval__max_chunks=2)
    worker = Worker(run_dir, CPU, poll=1)
    worker.follow(once=True)
    assert "2 of 8 sequences" in capsys.readouterr().err
    assert evaluate_command.main([str(run_dir), "--max-chunks", "all", "--record"]) == 0
    lines = read_records(run_dir / EVALUATIONS)
    assert [(line["set"], line["chunks"]) for line in lines] == [("valid", 8)]
    assert [line["chunks"] for line in read_records(run_dir / REPLACED)] == [2]
    worker.follow(once=True)
    worker.close()
    assert read_records(run_dir / EVALUATIONS) == lines
    (found,) = collect([str(run_dir)])
    assert found.newest() == lines


def test_records_are_of_runs_and_of_one_text_under_one_name(place, capsys, tmp_path):
    run_dir, export = begin_run(place, "strict")
    alone = tmp_path / "alone"
    shutil.copytree(export.path, alone)
    assert run_command(evaluate_command.main, [str(alone), "--record"]) == 2
    assert "lies in none; leave it out and use --json FILE" in capsys.readouterr().err
    other = tiny_pack(tmp_path / "other", LENGTH, 4, seed=5)
    assert run_command(evaluate_command.main, [str(run_dir), "--record", "--sets", f"valid={other}"]) == 2
    assert f"give {other} another name, such as valid2={other}" in capsys.readouterr().err
    assert not (run_dir / EVALUATIONS).exists()
    copy = tmp_path / "copy"
    shutil.copytree(place / "valid", copy)
    assert evaluate_command.main([str(run_dir), "--record", "--sets", f"valid={copy},valid2={other}"]) == 0
    assert [line["set"] for line in read_records(run_dir / EVALUATIONS)] == ["valid", "valid2"]


@pytest.mark.parametrize("end", ["ctrl-c", "mistake"])
def test_what_is_scored_is_kept_whatever_ends_the_command(place, capsys, monkeypatch, end):
    """Stopped, or met with a bad set, in the second of two."""
    run_dir, _ = begin_run(place, f"kept-{end}")
    file = place / f"kept-{end}.json"
    moved = perplexity.bound_of

    def bound_of(*words):
        if sum(1 for _ in read_records(run_dir / EVALUATIONS)):
            raise KeyboardInterrupt if end == "ctrl-c" else UserError("a sentence")
        return moved(*words)

    monkeypatch.setattr(perplexity, "bound_of", bound_of)
    words = [str(run_dir), "--sets", f"valid,again={place / 'valid'}", "--record", "--json", str(file)]
    code = run_command(evaluate_command.main, words)
    said = capsys.readouterr()
    (record,) = json.loads(file.read_text())
    assert read_records(run_dir / EVALUATIONS) == [record] and record["set"] == "valid"
    assert f"{record['ppl']:.2f}" in said.out
    if end == "ctrl-c":
        assert (
            code == 130
            and said.err.splitlines()[-1] == f"stopped: 1 of 2 sets are scored; kept in {file} and the run's records"
        )
    else:
        assert code == 2 and said.err.endswith("error: a sentence\n")


def test_pace_is_told_from_the_second_batch_on():
    said: list[str] = []
    pace = Pace({"a": 1000}, {"a": 1e15}, 0.0, interval=3600.0, hours=100.0, say=said.append)
    pace.note("a", 10, 1000, now=500.0)  # the first batch, slow as ever
    assert said == []
    pace.note("a", 20, 1000, now=600.0)
    assert said == [
        "an export takes about 2.8 hours, at 1.0e+11 operations a second",
        "warning: an export comes every 60 minutes, so one worker falls behind; start more workers, on GPUs, or give "
        "--max-chunks 360 (now up to 1,000 of a set)",
    ]
    pace.note("a", 30, 1000, now=9000.0)
    assert len(said) == 2
    slow = Pace({"a": 1000}, {"a": 1e15}, 1e15, interval=None, hours=24.0, say=said.append)
    slow.note("a", 10, 1000, now=0.0)
    with pytest.raises(TooSlow, match=r"about 5.8 days here \(2.0e\+15 .*--device cuda, or --max-chunks 172 \(now"):
        slow.note("a", 20, 1000, now=2500.0)


def test_operations_are_those_of_the_networks_passes(place):
    """Each view and the clean pass, of each sequence, by hand for a network of these shapes."""
    run = tiny_run(place, eval__samples=3)
    width, rows, length, layers = 32, run.model.vocab_size, LENGTH, 2
    linear = 2 * (4 * width**2 + 8 * width**2)
    pairs = 4 * width * 4 * (1 + 2 + 3 + 4) * 4
    noisy = layers * (length * linear + pairs) + 0.5 * (length - 1) * 2 * width * rows
    clean = (layers - 1) * (length * linear + pairs) + length * 4 * width**2
    wanted = dataclasses.replace(run.eval, views=4)
    assert set_flops(run, 10, wanted) == pytest.approx(10 * (4 * noisy + clean), rel=1e-6)
    exact = dataclasses.replace(run.eval, estimator="exact")
    assert set_flops(run, 10, exact) == pytest.approx(10 * (15 * noisy + clean), rel=1e-6)
    per_token = layers * linear + (length + 1) / 2 * 4 * width * layers + 2 * width * rows * (length - 1) / length
    assert sample_flops(run, run.eval) == pytest.approx(3 * length * 4 * per_token, rel=1e-6)


def test_the_time_between_exports_is_that_of_the_last_steps(place):
    run_dir, export = begin_run(place, "paced")
    assert seconds_between_exports(export.run, run_dir) is None
    append_records(
        run_dir / "records/train.jsonl", *({"step": n, "seconds": 100.0 if n < 3 else 0.5} for n in range(3000))
    )
    with open(run_dir / "records/train.jsonl", "a") as file:
        file.write('{"step": 9')
    assert seconds_between_exports(export.run, run_dir) == 0.5 * export.run.train.export_every


def test_worker_refuses_what_would_never_end(place, capsys):
    """With one sentence and no line in the errors: the set is sound, the machine is not."""
    run_dir, _ = begin_run(place, "slow")

    def follow(_: list[str], **limits: float) -> int:
        worker = Worker(run_dir, CPU, 1, 1, **limits)
        worker.follow(once=True)
        worker.close()
        return worker.exit_code

    assert run_command(partial(follow, max_hours=1e-12), []) == 2
    said = capsys.readouterr().err
    assert "above --max-hours 1e-12; use --device cuda, or --max-chunks 1 (now up to 8 of a set)" in said
    assert not (run_dir / "records/eval-errors.jsonl").exists() and not (run_dir / EVALUATIONS).exists()
    (lease,) = (run_dir / "leases").glob("step-*")
    assert json.loads(lease.read_text())["released"]
    assert run_command(partial(follow, max_chunks=3), []) == 0
    assert [line["chunks"] for line in read_records(run_dir / EVALUATIONS)] == [3]
    assert "an export is" in said and "(valid 8)" in said and "on cpu, " in said


def test_idle_parts_of_a_machine(monkeypatch):
    assert most_free([]) is None and most_free([(4, 10), (3, 10)]) is None and most_free([(5, 10), (8, 10)]) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert idle_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for load, threads in ((0.1, 8), (6.2, 2), (20.0, 1)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert idle_threads() == threads


def test_max_chunks_of_the_command_rule_over_the_configuration(place):
    export = export_of(place, "few", eval__max_chunks=2)
    file = place / "few.json"
    for words, chunks in (([], 2), (["--max-chunks", "3"], 3), (["--max-chunks", "all"], 8)):
        assert evaluate_command.main([str(export.path), "--json", str(file), *words]) == 0
        assert json.loads(file.read_text())[0]["chunks"] == chunks


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--sets", "vald"], "did you mean 'valid'?"),
        (["--sets", "vald"], "data_prep.prepare --source vald --tokenizer"),
        (["--sets", "valid,valid"], "twice"),
        (["--sets", "=x"], "NAME=DIR"),
        (["--sets", ""], "'' is neither NAME nor NAME=DIR"),
        (["--estimator", "exact", "--sets", "valid", "--views", "many"], "above 0"),
        (["--sets", "valid=nowhere"], "not found: 'nowhere'"),
        (["--estimator", "stratfied"], "did you mean 'stratified'?"),
        (["--views", "0"], "above 0"),
        (["--batch", "many"], "above 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--set", "valid"], "did you mean '--sets'?"),
        (["--sets", "long={place}/long"], "32 tokens"),
        (["--sets", "foreign={place}/foreign"], "tokens with [MASK]"),
        (["--sets", "same_size={place}/same_size"], "another tokenizer"),
    ],
)
def test_mistakes_are_one_sentence(place, capsys, words, sentence):
    export = export_of(place, "bd3")
    if not (place / "long").exists():
        tiny_pack(place / "long", 32, 2)
        tiny_pack(place / "foreign", LENGTH, 2, tokenizer=tiny_tokenizer(90))
        tiny_pack(place / "same_size", LENGTH, 2)
        manifest = place / "same_size" / "manifest.json"
        manifest.write_text(manifest.read_text().replace(tiny_tokenizer().fingerprint, "0" * 64))
    words = [word.replace("{place}", str(place)) for word in words]
    assert run_command(evaluate_command.main, [str(export.path), *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("error: ") and "Traceback" not in err and err.count("\n") == 1


def test_export_that_diverged(place, capsys):
    export = export_of(place, "diverged")
    weights = load_weights(export)
    weights["head.linear.weight"][0, 0] = math.nan
    write_export(export.path, weights, export.run, export.tokenizer, export.step)
    assert run_command(evaluate_command.main, [str(export.path)]) == 2
    assert "not finite (head.linear.weight)" in capsys.readouterr().err


def test_export_without_sets(place, capsys):
    run = tiny_run(place, run_dir=place / "bare")
    tiny_export(dataclasses.replace(run, eval=dataclasses.replace(run.eval, sets={})))
    assert run_command(evaluate_command.main, [str(place / "bare")]) == 2
    assert "--sets NAME=DIR" in capsys.readouterr().err


def test_the_summary_compares_one_and_the_same_text(place):
    """The unigram perplexity is of the sequences that were scored, which `--max-chunks` may have changed."""
    run_dir, export = begin_run(place, "summed", eval__max_chunks=6)
    step = {"step": export.step, "tokens": 128, "loss": 4.0, "seconds": 0.5}
    append_records(run_dir / "records/train.jsonl", step)
    assert evaluate_command.main([str(run_dir), "--record", "--max-chunks", "2"]) == 0
    (record,) = read_records(run_dir / EVALUATIONS)
    values = summary.column(run_dir)
    unigram = unigram_perplexity(place / "train", place / "valid", 2)
    assert values["  unigram perplexity: valid"] == f"{unigram:.1f}"
    assert values["held-out perplexity: valid"] == f"{record['ppl']:.1f} +- {record['ppl_stderr']:.1f}"
    assert values["  sequences, estimator: valid"] == "2 of 8, stratified, 4 views"
    assert values["objective, block size"] == "bd3, 4"
