"""`train.micro_batch: auto`, and what is said of batches that do not divide."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import run as entry
from bd3_ds.config.check import check_run
from bd3_ds.config.ds_json import DEFAULT, load_ds_json
from bd3_ds.config.load import from_values, load_recipe, load_resolved, to_yaml
from bd3_ds.config.schema import AUTO, RunConfig
from bd3_ds.launch.plan import Host, make_plan
from bd3_ds.model.build import dit_config
from bd3_ds.planning.memory import zero_of
from bd3_ds.planning.micro_batch import with_micro_batch
from bd3_ds.planning.plan import USABLE, worst_memory
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.runtime.gpus import find_gpu
from tests.helpers.tiny import tiny_run

RECIPE = "configs/recipes/openwebtext_pretrain.yaml"
VOCABULARY = ("model.vocab_size=50258", "model.mask_id=50257")


def paper(*words: str) -> RunConfig:
    return load_recipe(RECIPE, [*VOCABULARY, *words])


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("gpu", ["h100-80g", "a100-40g"])
def test_the_largest_that_divides_and_fits(ranks: int, gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the plan's own count: it fits, and the next larger divisor does not, or is the whole share."""
    ds_json, run = load_ds_json(DEFAULT), paper()
    assert run.train.micro_batch == AUTO
    check_run(run, ranks)
    found = with_micro_batch(run, ds_json, ranks, 8, gpu)
    check_run(found, ranks)
    memory = USABLE * find_gpu(gpu, "--gpu").memory

    def peak(size: int) -> int:
        tried = dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=size))
        return worst_memory(tried, dit_config(run.model, "bd3"), zero_of(ds_json), ranks, "none", True).peak

    size, part = found.train.micro_batch, 512 // ranks
    assert part % size == 0 and peak(size) <= memory and (size == part or peak(2 * size) > memory)
    assert capsys.readouterr().err.startswith(f"train.micro_batch={size} (auto) divides the {part} sequences")
    assert to_yaml(found) == to_yaml(run).replace("micro_batch: auto", f"micro_batch: {size}")


def test_where_nothing_fits_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    large = paper("model.hidden_size=8192", "model.heads=64", "model.layers=80")
    assert with_micro_batch(large, load_ds_json(DEFAULT), 8, 8, "h100-80g").train.micro_batch == 1
    assert "is the least, but does not fit" in capsys.readouterr().err


def test_a_grid_search_gets_whole_micro_batches() -> None:
    words = ("objective.clip_search.method=grid", "objective.clip_search.sequences=16", "objective.block_size=16")
    run = paper(*words, "eval.sets={valid: x}")
    assert with_micro_batch(run, load_ds_json(DEFAULT), 8, 8, "h100-80g").train.micro_batch == 2


def test_auto_is_kept_in_files(tmp_path: Path) -> None:
    run = paper()
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert "micro_batch: auto" in to_yaml(run)
    assert load_resolved(tmp_path / "run.yaml") == run == from_values(dataclasses.asdict(run), "a test")
    assert paper("train.micro_batch=4").train.micro_batch == 4


def test_the_launcher_leaves_it_to_the_ranks() -> None:
    plan = make_plan(paper(), [Host("a", 8), Host("b", 7)])
    assert plan is not None and (plan.ranks, plan.micro_batch) == (8, AUTO)


@pytest.mark.parametrize(
    ("words", "ranks", "said"),
    [
        ("train.micro_batch=32", 64, "x 64 ranks = 2048; set train.micro_batch=8, or auto; or, as another training"),
        ("train.micro_batch=auto", 48, "not a multiple of 48 ranks, whatever train.micro_batch is; start 32 ranks"),
        ("train.micro_batch=3", 1024, "not a multiple of 1024 ranks, whatever train.micro_batch is; start 512 ranks"),
    ],
)
def test_the_micro_batch_is_offered_before_the_global_batch(words: str, ranks: int, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_run(paper(words), ranks)
    (message,) = error.value.messages
    assert said in message and message.index("train.global_batch that is: ") > message.index(said)


def test_check_plans_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(tmp_path)
    assert run_command(entry.main, ["check", str(tmp_path / "recipe.yaml"), "train.micro_batch=auto"]) == 0
    said = capsys.readouterr()
    assert "global batch 4 = 4 (auto) x 1 micro-batches x 1 ranks" in said.out and not said.err
