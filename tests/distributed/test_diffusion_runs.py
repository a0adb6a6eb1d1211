"""Runs whose noise changes on the way: block sizes, clip intervals and frequencies, interrupted and on other ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from bd3_ds.checkpoint.export import find_export, list_exports, load_weights
from bd3_ds.config.schema import block_size
from bd3_ds.runtime.errors import run_command
from tests.helpers.launch import curve, launch_training, start_training, stop, train, train_records, wait_for_step
from tests.helpers.tiny import tiny_run

STEPS = 24
MOVING = (
    "objective.block_schedule={0: [16], 6: [2, 4, 8], 18: [4]}",
    "objective.clip_search.method=moments",
    "objective.clip_search.every=6",
    "objective.clip_search.explore=0.2",
    "objective.weight.name=iddpm",
    "objective.views=2",
    "train.global_batch=32",
    "train.checkpoint_every=1000",
    "train.export_every=5",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("diffusion-runs")
    tiny_run(directory)
    return directory / "recipe.yaml"


def intervals(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["block_size"], line["t_min"], line["t_max"]) for line in train_records(run_dir)]


def test_moving_noise_is_training_state(recipe: Path) -> None:
    """Block sizes by stage, intervals found from moments; stopped half-way the run goes on as if it had not been."""
    words = (*MOVING, f"train.total_steps={STEPS}")
    whole, parts = recipe.parent / "whole", recipe.parent / "parts"
    words = (*words, "train.micro_batch=8")
    said = train(recipe, f"run_dir={whole}", *words)
    with start_training(recipe, f"run_dir={parts}", *words) as process:
        wait_for_step(parts, 8, process)
        stop(process, signal.SIGTERM)
    saved = len(train_records(parts))
    assert 8 <= saved < STEPS
    train(recipe, f"run_dir={parts}", *words)
    assert curve(parts) == curve(whole) and len(curve(whole)) == STEPS
    assert intervals(parts) == intervals(whole)

    sizes = [size for size, _, _ in intervals(whole)]
    assert set(sizes[:6]) == {16} and set(sizes[6:18]) == {2, 4, 8} and set(sizes[18:]) == {4}
    assert "clip search, block size 4: t in [" in said
    assert len({low_high for _, *low_high in map(list, intervals(whole)) for low_high in [tuple(low_high)]}) > 1
    # What the last search chose is in the newest checkpoint, and in the exports' configuration.
    checkpoint = sorted((whole / "checkpoints").glob("step-*"))[-1]
    clips = json.loads((checkpoint / "manifest.json").read_text())["state"]["clips"]
    newest = find_export(str(whole))
    schedule = newest.run.objective.schedule
    assert clips["4"]["interval"] == [schedule.t_min, schedule.t_max]
    by_step = {find_export(str(path)).step: block_size(find_export(str(path)).run) for path in list_exports(whole)}
    assert by_step == {5: 16, 10: 4, 15: 4, 20: 4, 24: 4}
    ours, theirs = load_weights(newest), load_weights(find_export(str(parts)))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_moving_noise_does_not_depend_on_ranks(recipe: Path) -> None:
    """One rank with micro-batches of 32 against two with micro-batches of 4: the same sizes, intervals and losses."""
    one, two = recipe.parent / "one", recipe.parent / "two"
    words = (*MOVING, f"train.total_steps={STEPS}")
    train(recipe, f"run_dir={one}", *words, "train.micro_batch=32", ranks=1)
    train(recipe, f"run_dir={two}", *words, "train.micro_batch=4")
    assert intervals(one) == intervals(two)
    for step, (loss, norm) in curve(one).items():
        assert curve(two)[step] == pytest.approx((loss, norm), rel=1e-4), step


@pytest.mark.slow
@pytest.mark.parametrize("ds_config", ["zero1", "zero3"])
def test_grid_search_under_zero(recipe: Path, ds_config: str) -> None:
    """Forward passes on held-out text: two ranks choose as one does, and training goes on at the chosen interval."""
    words = (
        "objective.clip_search.method=grid",
        "objective.clip_search.every=4",
        "objective.clip_search.sequences=8",
        "train.total_steps=8",
        "train.global_batch=8",
        "train.checkpoint_every=1000",
        "train.export_every=1000",
        "train.activation_checkpointing=full",
    )
    one, two = recipe.parent / f"grid-one-{ds_config}", recipe.parent / f"grid-two-{ds_config}"
    train(recipe, f"run_dir={one}", *words, "train.micro_batch=8", ranks=1, ds_config="zero0")
    said = train(recipe, f"run_dir={two}", *words, "train.micro_batch=4", ds_config=ds_config)
    assert intervals(one) == intervals(two)
    assert intervals(two)[3] == (4, 0.001, 1.0) and intervals(two)[4][1] > 0.001
    assert "step 4: clip search, block size 4: t in [" in said and "candidates" in said


@pytest.mark.slow
def test_fixed_clip_and_frequency_stay_in_force(recipe: Path) -> None:
    """No search, no reset: the configured interval holds for all steps and across a stop, and masks follow rarity."""
    run_dir = recipe.parent / "fixed"
    words = (
        f"run_dir={run_dir}",
        "objective.schedule.t_min=0.3",
        "objective.schedule.t_max=0.8",
        "objective.frequency.power=0.5",
        "objective.frequency.curriculum_steps=3",
        "data.document_mask=true",
        "train.checkpoint_every=3",
    )
    train(recipe, *words, "train.total_steps=6")
    train(recipe, *words, "train.total_steps=9")
    assert {low_high for _, *rest in intervals(run_dir) for low_high in [tuple(rest)]} == {(0.3, 0.8)}
    assert len(train_records(run_dir)) == 9
    refused = launch_training(recipe, *words[:2], "objective.schedule.t_max=0.9", "train.total_steps=12", ranks=1)
    assert refused.returncode == 2 and "objective.schedule.t_max was 0.8" in refused.stdout


def test_free_search_needs_no_held_out_text(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import run as entry

    words = ["check", str(recipe), "--resolved", "eval.sets={}", "objective.clip_search.method=moments"]
    assert run_command(entry.main, words) == 0
    assert "clip_search" in capsys.readouterr().out
