"""`run.py check`: its verdict and table, what it plans without data, the disk, the dry step, the schedule's picture."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from bd3_ds.commands import check as check_command
from bd3_ds.config.ds_json import load_ds_json
from bd3_ds.config.load import load_recipe
from bd3_ds.data.manifest import read_manifest
from bd3_ds.model.build import dit_config
from bd3_ds.planning import dry_step
from bd3_ds.planning.disk import disk_of, free_at
from bd3_ds.planning.memory import memory_of, parameter_count, zero_of
from bd3_ds.planning.micro_batch import largest_micro_batch, micro_batches, set_micro_batch
from bd3_ds.planning.plan import LOADER_SECONDS, flops_per_token, machine_of, make_plan
from bd3_ds.planning.schedule_plot import schedule_figure
from bd3_ds.planning.vocabulary import assumed_vocabulary
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.gpus import GIB
from tests.helpers.launch import ROOT
from tests.helpers.tiny import tiny_export, tiny_run
from tests.unit.planning.test_plan import LENGTH, wide_run


def test_check_plans_for_a_gpu_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(tmp_path)
    words = [str(tmp_path / "recipe.yaml"), "train.global_batch=64", "model.attention=flex"]
    options = ["--world-size", "32", "--nodes", "4", "--gpu", "h100-80g", "--json", str(tmp_path / "plan.json")]
    assert check_command.main([*words, *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("fits: ") and " at ZeRO stage 2; " in said.splitlines()[0]
    assert "32 x h100-80g, 8 to a node" in said and "dry step" not in said
    assert "global batch 64 = 2 x 1 micro-batches x 32 ranks = 1,024 tokens" in said
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["ranks"] == 32 and made["zero"]["stage"] == 2 and made["speed"]["mfu"] == 0.4
    assert made["memory"]["peak"] == max(made["memory"]["moments"].values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "h10-80g"], "--gpu=h10-80g is unknown; did you mean 'h100-80g'"),
        (["--world-size", "4", "--nodes", "3"], "--nodes=3 must divide --world-size=4"),
        (["--mfu", "1.5"], r"'1.5' must lie in \(0, 1\]"),
        (["--json", "{dir}"], "is a directory; name a JSON file"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(tmp_path: Path, options: list[str], sentence: str) -> None:
    words = [word.format(dir=tmp_path) for word in options]
    with pytest.raises(UserError, match=sentence):
        check_command.main(["recipe.yaml", *words])


RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_without_data(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine that has none: a verdict, a table of 100 columns, what is not there; and the figures agree."""
    monkeypatch.chdir(tmp_path)
    words = [str(recipe), "--gpu", "h100-80g", "--world-size", "8", "--json", str(tmp_path / "plan.json")]
    assert check_command.main(words) == 0
    said = capsys.readouterr().out
    assert re.match(r"fits: [\d.]+ of 72\.7 GiB at ZeRO stage 2; (compute|communication|data)-bound; .* at 40%\s", said)
    # A path is never broken.
    assert all(len(line) <= 100 or str(tmp_path) in line for line in said.splitlines())
    assert "warning: data not there yet: " in said and "shards unchecked" in " ".join(said.split())
    assert "dry step" not in said
    made = json.loads((tmp_path / "plan.json").read_text())
    bound = made["bound"]
    assert bound["seconds"][bound["name"]] == max(bound["seconds"].values()) == bound["step_seconds"]
    assert bound["days"] >= made["speed"]["days"] or bound["days"] == pytest.approx(made["speed"]["days"])
    assert made["memory"]["fits"] and made["largest_micro_batch"] >= made["batch"]["micro"]
    assert made["batch"]["micro"] * made["batch"]["accumulation"] * made["batch"]["groups"] == made["batch"]["global"]
    vocabulary = 1025 if "docs" in recipe.stem else 30522 if "lm1b" in recipe.stem else 50258
    rows = {1025: 1025, 30522: 30528, 50258: 50258 if recipe.stem == "my_text" else 50304}[vocabulary]
    run = load_recipe(str(recipe), [f"model.vocab_size={vocabulary}", "model.mask_id=1"])
    network = dit_config(run.model, run.objective.name)
    assert network.vocab_rows == rows and made["parameters"] == parameter_count(network)


def test_the_papers_run_on_64_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The automatic micro-batch is the 8 sequences that 512 / 64 leaves."""
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "configs/recipes/openwebtext_pretrain.yaml")
    assert check_command.main([recipe, "--world-size", "64", "--nodes", "8", "--gpu", "h100-80g"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "communication-bound; 4.7 hours (compute 3.6 hours at 40% MFU); 26.2 M tokens/s" in said
    assert "169,697,920 parameters" in said
    assert "global batch 512 = 8 (auto) x 1 micro-batches x 64 ranks = 524,288 tokens" in said
    assert "vocabulary taken as GPT-2's 50,257 tokens and [MASK]; shards unchecked" in said
    # Checkpoints of 16 bytes a number, the two kept and the one being written; an export of 4 each 10,000 steps.
    assert re.search(r"3 x 2\.53 GiB checkpoints \(one being written\), \d+ x 0\.63 GiB exports", said)
    assert "vocab_size: 50258" not in said
    assert check_command.main([recipe, "--gpu", "h100-80g", "--resolved"]) == 0
    said = capsys.readouterr().out
    assert "  vocab_size: 50258\n" in said and "8 x h100-80g, 8 to a node (--world-size and --nodes not given)" in said


def test_what_would_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A large model at stage 0 is more than a small GPU has."""
    run = wide_run(tmp_path, train__global_batch=60, train__micro_batch=60, train__precision="bf16")
    big = [
        "model.hidden_size=2048",
        "model.layers=24",
        "model.heads=16",
        "train.micro_batch=60",
        "train.global_batch=60",
    ]
    words = [str(tmp_path / "recipe.yaml"), f"data.length={LENGTH}", "objective.block_size=16", *big]
    options = ["--gpu", "a10-24g", "--world-size", "1", "--deepspeed_config", str(ROOT / "ds_configs/zero0.json")]
    assert run.data.length == LENGTH and check_command.main([*words, *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("does not fit: needs ") and "to fit" in said and "20.2 GiB at ZeRO stage 0" in said


def test_the_largest_micro_batch(tmp_path: Path) -> None:
    """Of those that divide 48 sequences on 2 ranks, whatever the recipe has; none where nothing fits or divides."""
    run = wide_run(tmp_path, train__global_batch=48, train__micro_batch=5, train__precision="bf16")
    network, machine = dit_config(run.model, "bd3"), machine_of("h100-80g", "bf16", 8)
    assert micro_batches(run, 2) == [1, 2, 3, 4, 6, 8, 12, 24] and micro_batches(run, 5) == []
    assert largest_micro_batch(run, network, {}, 2, machine.memory, True) == 24
    grid = dataclasses.replace(run.objective.clip_search, method="grid", sequences=14)
    searched = dataclasses.replace(run, objective=dataclasses.replace(run.objective, clip_search=grid))
    assert (
        largest_micro_batch(searched, network, {}, 2, machine.memory, True) == 6
    )  # 7 sequences for each rank's search
    for size in (6, 8):
        peak = memory_of(set_micro_batch(run, size), network, 16, zero_of({}), 2, "none", True).peak
        assert largest_micro_batch(run, network, {}, 2, peak, True) == size
        assert largest_micro_batch(run, network, {}, 2, peak - 1, True) != size
    assert largest_micro_batch(run, network, {}, 2, 1.0, True) is None
    assert largest_micro_batch(run, network, {}, 5, machine.memory, True) is None
    shared = dataclasses.replace(run, train=dataclasses.replace(run.train, sequence_parallel=2))
    assert micro_batches(shared, 2) == [n for n in range(1, 49) if 48 % n == 0] and micro_batches(shared, 3) == []


@pytest.mark.parametrize(
    ("words", "checkpoints", "exports"),
    [
        ("train.total_steps=100 train.checkpoint_every=10 train.export_every=30", 3, 4),
        ("train.total_steps=100 train.checkpoint_every=10 train.keep_every=20 train.export_every=100", 8, 1),
        ("train.total_steps=10 train.checkpoint_every=10 train.export_every=1000", 1, 1),
        ("train.total_steps=100 train.checkpoint_every=10 train.keep_checkpoints=50 train.export_every=1", 10, 100),
    ],
)
def test_disk(tmp_path: Path, words: str, checkpoints: int, exports: int) -> None:
    run = tiny_run(tmp_path, *words.split(), train__log_every=5)
    found = disk_of(run, 1000)
    assert (found.checkpoints, found.exports) == (checkpoints, exports)
    steps = run.train.total_steps
    assert found.run_dir == checkpoints * 16_000 + exports * 4_000 + 300 * steps + 1_500 * (steps // 5)
    assert found.cache == 0
    remote = dataclasses.replace(run, data=dataclasses.replace(run.data, train="s3://there/train", cache=str(tmp_path)))
    assert disk_of(remote, 1000).cache is None
    limited = dataclasses.replace(remote, data=dataclasses.replace(remote.data, cache_limit="2gb"))
    assert disk_of(limited, 1000).cache == 2 * GIB


def test_disk_of_a_real_run(tmp_path: Path) -> None:
    """The bytes of a number in an export, as they are written."""
    run = tiny_run(tmp_path)
    export = tiny_export(run)
    count = parameter_count(dit_config(run.model, run.objective.name))
    written = (export / "model.safetensors").stat().st_size
    assert disk_of(run, count).export <= written < disk_of(run, count).export + 8192
    assert free_at(run.run_dir) - free_at(str(tmp_path / "new" / "run")) >= 0


def test_a_long_dry_step_is_announced_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(tmp_path)
    recipe = str(tmp_path / "recipe.yaml")
    assert check_command.main([recipe]) == 0
    said = capsys.readouterr().out
    plan, announced, result = (
        said.index(text) for text in ("fits: ", "taking one dry step on one sequence (", "dry step: loss ")
    )
    assert plan < announced < result
    assert check_command.main([recipe, "--no-dry-step"]) == 0
    assert "dry step" not in capsys.readouterr().out
    monkeypatch.setattr(dry_step, "LONGEST", 0.0)
    assert check_command.main([recipe]) == 0
    said = capsys.readouterr().out
    assert "no dry step: " in said and "--dry-step takes it all the same" in said and "loss" not in said
    assert check_command.main([recipe, "--dry-step"]) == 0
    assert "dry step: loss " in capsys.readouterr().out


def test_a_dry_step_of_16_thousand_tokens_is_long(tmp_path: Path) -> None:
    """17 TFLOP or so of forward, recomputed and backward pass: minutes on CPU cores, which are not spent unasked."""
    run = load_recipe(str(ROOT / "configs/recipes/long_16k.yaml"), ["model.vocab_size=50258", "model.mask_id=50257"])
    network = dit_config(run.model, "bd3")
    per_token = sum(flops_per_token(network, run))
    assert dry_step.sequence_flops(network, run) == pytest.approx(per_token * 16_384) and per_token * 16_384 > 5e13
    kept = dry_step.needed_bytes(network, run, torch.device("cpu")) - 16 * parameter_count(network)
    assert kept > 12 * 2 * 16_384 * 768 * 4  # each layer's input, clean and noisy, in fp32


@pytest.mark.parametrize(
    ("place", "size"),
    [
        ("data/openwebtext/train", 50_258),
        ("data/openwebtext-16k/train", 50_258),
        ("/mnt/lm1b/train", 30_522),
        ("runs/docs/data/train", 1_025),
        ("data/my_docs/train", 50_258),
    ],
)
def test_the_vocabulary_without_data(tmp_path: Path, place: str, size: int) -> None:
    run = load_recipe(str(ROOT / "configs/recipes/openwebtext_bd3.yaml"), [f"data.train={place}"])
    found = assumed_vocabulary(run, None)
    assert found.size == size and found.mask_id < size
    given = load_recipe(str(ROOT / "configs/recipes/openwebtext_bd3.yaml"), ["model.vocab_size=32000"])
    assert assumed_vocabulary(given, None).size == 32_000 and assumed_vocabulary(given, None).mask_id == 31_999
    tiny_run(tmp_path)
    assert assumed_vocabulary(run, read_manifest(tmp_path / "valid")).size == 81


@pytest.mark.parametrize(
    ("key", "name", "meant"), [("data.train", "trian", "train"), ("eval.sets.valid", "vlid", "valid")]
)
def test_a_misspelt_pack_is_no_missing_one(tmp_path: Path, key: str, name: str, meant: str) -> None:
    """A pack beside it has almost its name; without one, data is taken to come later."""
    tiny_run(tmp_path)
    sentence = f"{key}: data pack not found: '{tmp_path / name}'; did you mean '{tmp_path / meant}'?"
    with pytest.raises(UserError) as refused:
        check_command.main([str(tmp_path / "recipe.yaml"), f"{key}={tmp_path / name}"])
    assert refused.value.messages == (sentence,)


@pytest.mark.parametrize(
    ("words", "top"),
    [
        ("objective.block_size=4", 1.1 * 0.2),  # flat: nearly 1/5 for each of 0 … 4 masked tokens
        ("objective.schedule.t_min=1 objective.schedule.t_max=1", 1.1),
        ("objective.weight.name=simple objective.schedule.name=gaussian", None),
    ],
)
def test_axes_of_the_schedule_begin_at_zero(tmp_path: Path, words: str, top: float | None) -> None:
    """A flat probability looks flat; one rate alone, or one weight for all, is to be seen."""
    density, weight, share = schedule_figure(tiny_run(tmp_path, *words.split())).axes
    for axes in (density, share):
        low, high = axes.get_ylim()
        drawn = [y for line in axes.get_lines() for y in line.get_ydata()]
        assert low == 0 and high >= 1.05 * max(drawn[:-2], default=0.95)  # but for the line that marks the mean
    if top is not None:
        assert share.get_ylim()[1] == pytest.approx(top, rel=0.02)
    low, high = weight.get_ylim()
    assert high / low >= 9.99
    assert all(line.get_xydata().shape[0] > 0 for line in density.get_lines()) and density.get_lines()


def test_other_stages_are_planned_as_their_files_have_them(tmp_path: Path) -> None:
    """What `--deepspeed_config ds_configs/zero3.json` would say of stage 3, the plan for stage 2 says as well."""
    run = wide_run(tmp_path, train__precision="bf16", train__global_batch=4 * 8)
    network, machine = dit_config(run.model, "bd3"), machine_of("h100-80g", "bf16", 8)
    two, three = (load_ds_json(ROOT / f"ds_configs/zero{stage}.json") for stage in (2, 3))
    rows = {row["recompute"]: row["peak"] for row in make_plan(run, network, two, 8, 1, machine, 0.4)["stages"][9:]}
    assert rows["none"] == make_plan(run, network, three, 8, 1, machine, 0.4)["memory"]["peak"]


def test_the_longest_bounds_a_step(tmp_path: Path) -> None:
    """Between computing, sending and reading; with slow links the days are those of sending."""
    run = wide_run(tmp_path, train__precision="bf16", train__global_batch=64)
    network, machine = dit_config(run.model, "bd3"), machine_of("h100-80g", "bf16", 8)
    slow = dataclasses.replace(machine, peak=1e9)
    assert make_plan(run, network, {}, 16, 2, slow, 0.5)["bound"]["name"] == "compute"
    found = make_plan(run, network, {}, 16, 2, machine, 0.5)
    reading = 64 / 16 * LOADER_SECONDS[0]
    assert found["bound"]["seconds"]["data"] == pytest.approx(reading) and found["bound"]["name"] == "data"
    assert found["bound"]["days"] == pytest.approx(4 * reading / 86400)
    assert found["bound"]["tokens_per_s"] == pytest.approx(64 * LENGTH / reading)
    fast = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=2))
    assert make_plan(fast, network, {}, 16, 2, machine, 0.5)["bound"]["seconds"]["data"] > reading
