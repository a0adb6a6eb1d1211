"""From files to a resolved run, and the arithmetic that follows from it."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bd3_ds.config.check import accumulation_steps, check_run, estimator_used, unreached
from bd3_ds.config.ds_json import DEFAULT, OWNED_BY_YAML, complete_ds_json, load_ds_json
from bd3_ds.config.keys import flat
from bd3_ds.config.load import load_recipe, load_resolved, to_yaml
from bd3_ds.config.merge import CONFIGS
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import OptimConfig, RunConfig, block_size
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import write_text
from bd3_ds.train.lr import learning_rate
from tests.helpers.golden_recipes import GOLDEN, RECIPES, golden_text

ANY = str(RECIPES[0])


def recipe(*words: str) -> RunConfig:
    """A small bd3 run without shards."""
    return load_recipe(str(CONFIGS / "recipes" / "docs_pretrain.yaml"), list(words))


def keys(tree: Any, prefix: str = "") -> set[str]:
    """Dotted keys of nested mappings; `eval.sets` and other empty ones are leaves."""
    found: set[str] = set()
    for name, value in tree.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name}
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_resolves_as_before(path: Path) -> None:
    """A difference is a changed recipe or include: `python -m tests.helpers.golden_recipes`, then review the diff."""
    run = load_recipe(str(path), [])
    check_run(run, world_size=run.train.sequence_parallel)
    assert golden_text(run) == (GOLDEN / path.name).read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.glob("*.yaml")} == {path.name for path in RECIPES}


def test_recipes_for_gpus_fit_on_eight_ranks() -> None:
    for path in RECIPES:
        if not path.stem.startswith(("docs", "my_")):
            run = load_recipe(str(path), [])
            check_run(run, world_size=8)
            assert run.train.global_batch * run.data.length == 512 * (128 if path.stem.startswith("lm1b") else 1024)


def test_base_covers_the_schema() -> None:
    base = yaml.safe_load((CONFIGS / "base.yaml").read_text())
    assert keys(base) == set(flat(load_recipe(ANY, ["eval.sets={}"])))
    assert [key for key, value in flat_yaml(base).items() if value == "???"] == ["run_dir", "data.train"]


def flat_yaml(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat_yaml(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def test_order_of_authority(tmp_path: Path) -> None:
    """base.yaml < includes < recipe < command line."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "include: [model/medium, objective/bd3]\nrun_dir: x\ndata: {train: y}\nobjective: {block_size: 8}\n"
    )
    run = load_recipe(str(path), ["model.layers=5"])
    assert (run.model.hidden_size, run.objective.block_size, run.model.layers) == (1024, 8, 5)
    assert run.optim.lr == 3e-4  # base.yaml


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_run_yaml_comes_back(path: Path, tmp_path: Path) -> None:
    run = load_recipe(str(path), ["optim.lr=1.2345678901234567e-5", "eval.max_chunks=null"])
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    assert load_resolved(file) == run


def test_a_run_from_before_a_key_existed_is_read(tmp_path: Path) -> None:
    """It has the key's default, which is what was done before; what has no default is missed by name."""
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(recipe()).replace("  document_mask: false\n", ""))
    assert load_resolved(file) == recipe()
    file.write_text(to_yaml(recipe()).replace("  train: runs/docs/data/train\n", ""))
    with pytest.raises(UserError, match=r"lacks data\.train$"):
        load_resolved(file)


def test_block_size_of_each_objective() -> None:
    sizes = {name: block_size(recipe(f"objective.name={name}")) for name in OBJECTIVES}
    assert sizes == {"ar": 1, "mdlm": 128, "sedd": 128, "bd3": 128}
    assert block_size(recipe("objective.block_size=4")) == 4


@pytest.mark.parametrize(
    ("words", "asked", "used"),
    [
        ("objective.name=ar", "exact", "exact"),
        ("objective.name=ar", "mc", "exact"),
        ("objective.name=sedd", "mc", "mc"),
        ("objective.name=sedd", "stratified", None),
        ("objective.name=sedd", "exact", None),
        ("objective.name=mdlm", "exact", None),
        ("objective.name=mdlm", "mc", "mc"),
        ("objective.block_size=8", "exact", "exact"),
        ("objective.block_size=16", "exact", None),
        ("objective.block_size=16", "stratified", "stratified"),
        ("objective.name=ar", "guess", None),
    ],
)
def test_estimators(words: str, asked: str, used: str | None) -> None:
    """One rule for the configuration, the command and the API."""
    run = recipe(words, f"eval.estimator={asked}")
    if used is not None:
        assert estimator_used(run, asked, "estimator") == used
        check_run(run, world_size=1)
        return
    with pytest.raises(UserError, match=f"estimator={asked}"):
        estimator_used(run, asked, "estimator")
    with pytest.raises(UserError, match=rf"^eval\.estimator={asked}"):
        check_run(run, world_size=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("objective.name=mdlm",), "mdlm denoises all 128 tokens of a sequence together here; use stratified"),
        ((), "bd3 denoises all 128 tokens of a sequence together here; use stratified"),
        (("objective.block_size=32",), "up to 16 tokens, and objective.block_size is 32; use stratified"),
    ],
)
def test_exact_speaks_of_what_was_written(words: tuple[str, ...], said: str) -> None:
    """Of no block size that nobody set."""
    run = recipe(*words)
    with pytest.raises(UserError) as error:
        estimator_used(run, "exact", "--estimator")
    assert said in str(error.value) and ("block_size" in str(error.value)) == bool("block_size=32" in "".join(words))


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 32))
def test_accumulation(micro_batch: int, ranks: int, steps: int) -> None:
    run = RUN
    batch = dataclasses.replace(run.train, micro_batch=micro_batch, global_batch=micro_batch * ranks * steps)
    run = dataclasses.replace(run, train=batch)
    check_run(run, ranks)
    assert accumulation_steps(run, ranks) == steps


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 2048))
def test_a_batch_is_never_rounded_silently(micro_batch: int, ranks: int, global_batch: int) -> None:
    """The sentence names a global batch that fits."""
    train = dataclasses.replace(RUN.train, micro_batch=micro_batch, global_batch=global_batch)
    try:
        check_run(dataclasses.replace(RUN, train=train), ranks)
    except UserError as error:
        assert global_batch % (micro_batch * ranks)
        near = int(str(error).rpartition(": ")[2])
        check_run(dataclasses.replace(RUN, train=dataclasses.replace(train, global_batch=near)), ranks)
    else:
        assert accumulation_steps(dataclasses.replace(RUN, train=train), ranks) * micro_batch * ranks == global_batch


def test_learning_rate() -> None:
    """Linear from lr / warm-up to lr, then constant, or half a cosine to min_lr at the last step."""
    optim = dataclasses.replace(RUN.optim, lr=1.0, warmup_steps=4, decay="constant", min_lr=0.1)
    assert rates(optim, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = dataclasses.replace(optim, decay="cosine")
    assert rates(cosine, 4 + 8)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(cosine, 4 + 4, 12) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(cosine, 4 + 2, 12) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert learning_rate(cosine, 12, 12) == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates(cosine, 12)[4:], rates(cosine, 12)[5:], strict=False))
    assert rates(dataclasses.replace(optim, warmup_steps=0), 2) == [1.0, 1.0]


def test_warm_up_stable_decay() -> None:
    """Falls over the last part only, to min_lr after the last step; the same halves for a cosine."""
    linear = dataclasses.replace(RUN.optim, lr=1.0, warmup_steps=4, decay="linear", decay_share=0.5, min_lr=0.2)
    assert rates(linear, 4 + 8) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert learning_rate(linear, 12, 12) == pytest.approx(0.2)
    cosine = dataclasses.replace(linear, decay="cosine")
    assert rates(cosine, 12)[:9] == rates(linear, 12)[:9]
    assert learning_rate(cosine, 10, 12) == pytest.approx(0.6) and learning_rate(cosine, 12, 12) == pytest.approx(0.2)
    assert rates(dataclasses.replace(linear, decay_share=1.0, warmup_steps=0, min_lr=0.0), 4) == [1.0, 0.75, 0.5, 0.25]


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    cosine = dataclasses.replace(RUN.optim, lr=1.0, warmup_steps=8, decay="cosine", min_lr=0.1)
    assert rates(cosine, 4) == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_short_trial_of_a_recipe_is_no_mistake(path: Path) -> None:
    """What it ends before is said, and nothing is changed."""
    run = load_recipe(str(path), ["train.total_steps=20"])
    check_run(run, world_size=run.train.sequence_parallel)
    said = unreached(run)
    assert [note.partition("=")[0] for note in said] == ["optim.warmup_steps"]
    assert (
        f"is not below train.total_steps=20: the learning rate only rises, to {rates(run.optim, 20)[-1]:.3g}" in said[0]
    )


def test_all_that_a_run_ends_before_is_said() -> None:
    run = recipe(
        "objective.block_size=4",
        "objective.block_schedule={0: [8], 500: [4]}",
        "objective.clip_search.method=moments",
        "objective.frequency={power: 0.1, curriculum_steps: 250}",
    )
    check_run(run, world_size=1)
    assert [note.split("=")[0].split()[0] for note in unreached(run)] == [
        "objective.block_schedule",
        "objective.clip_search.every",
        "objective.frequency.curriculum_steps",
    ]
    assert not unreached(dataclasses.replace(run, train=dataclasses.replace(run.train, total_steps=1001)))


def rates(optim: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize("path", sorted(DEFAULT.parent.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_files(path: Path) -> None:
    """The JSON owns memory and communication; what the YAML owns is filled in."""
    run = recipe("train.global_batch=32", "train.micro_batch=4", "optim.clip=0.5")
    content = load_ds_json(path)
    assert not OWNED_BY_YAML.keys() & content.keys()
    filled = complete_ds_json(content, run, world_size=2)
    assert filled["train_batch_size"] == 32 and filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 4 and filled["gradient_clipping"] == 0.5
    assert content.items() <= filled.items()


RUN = recipe()


@pytest.mark.parametrize(
    "word", ["2024_11_27", "010", "off", "1:30", "1e-3", "0x1F", "2024-11-27", "null", "a: b", "#1"]
)
def test_text_is_taken_as_it_stands(word: str) -> None:
    """Nothing of it is read as YAML, at any place of the command line that takes text."""
    run = recipe(
        f"run_dir={word}", f"data.train={word}", f"eval.sets.a.b={word}", f"data.mix.{word}=0.5", f"data.cache='{word}'"
    )
    assert (run.run_dir, run.data.train, run.eval.sets["a.b"], run.data.mix) == (word, word, word, {word: 0.5})
    assert run.data.cache == word


def test_text_inside_braces_and_brackets() -> None:
    run = recipe("eval.sets={a: 010, b: off}", "data.mix={2024_11: .25}", "model.biases=[010, off]")
    assert run.eval.sets == {"a": "010", "b": "off"} and run.data.mix == {"2024_11": 0.25}
    assert run.model.biases == ["010", "off"]


def test_null_and_the_word_null() -> None:
    assert recipe("train.init_from=null").train.init_from is None
    assert recipe("train.init_from='null'").train.init_from == "null"
    assert recipe("run_dir=null").run_dir == "null"


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not, behind `data.train=`."""
    monkeypatch.setenv("HOME", "/home/me")
    run = recipe("data.train=~/a", "eval.sets={a: ~/b}", "data.mix={~/c: 0.5}", "run_dir=~")
    assert (run.data.train, run.eval.sets, run.data.mix) == ("/home/me/a", {"a": "/home/me/b"}, {"/home/me/c": 0.5})
    assert run.run_dir == "/home/me"


@given(st.text(min_size=1) | st.from_regex(r"[-+0-9_.:eExoOnaifTrueyOff~]{1,12}", fullmatch=True))
@settings(max_examples=40, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    """From the command line, and from the run.yaml that is made of it."""
    assume("${" not in text and text != "???" and not text.startswith("~") and text[0] + text[-1] not in ("''", '""'))
    assume(text.isprintable() or all(ord(sign) not in (0, 0xFEFF) for sign in text))
    run = recipe(f"run_dir={text}", f"eval.sets.a={text}")
    assert (run.run_dir, run.eval.sets["a"]) == (text, text)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "run.yaml"
        write_text(file, to_yaml(run))
        assert load_resolved(file) == run


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_any_number_comes_back(number: float, whole: int) -> None:
    run = recipe(f"optim.lr={number!r}", f"seed={whole}", f"train.total_steps={whole:_}")
    assert (run.optim.lr, run.seed, run.train.total_steps) == (number, whole, whole)


@pytest.mark.parametrize("word", ["1_000", "1000", "+1000", "1e3", "1_000.0"])
def test_ways_to_write_a_whole_number(word: str) -> None:
    assert recipe(f"train.total_steps={word}").train.total_steps == 1000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run_dir: 2024_11_27", r"run_dir=2024_11_27 in .* is read by YAML as a number .* in quotes: '2024_11_27'"),
        ("run_dir: 010", "read by YAML as a number"),
        ("run_dir: off", "read by YAML as a true or false"),
        ("run_dir: 2024-11-27", "read by YAML as a date"),
        ("run_dir: 1e-3", "read by YAML as a number"),
        ("run_dir: null", "run_dir=null in .* must be text"),
        ("eval: {sets: {a: 12}}", "read by YAML as a number"),
        ("data: {mix: {2024_11: 0.5}}", "read by YAML as a number"),
        ("model: {biases: [off]}", "read by YAML as a true or false"),
        ("train: {total_steps: 010}", "no leading zeros"),
        ("train: {total_steps: 1:30}", "no base 60"),
        ("data: {shuffle: yes}", "must be true or false"),
        ("optim: {lr: 1.0}\noptim: {beta1: 0.5}", "duplicate key optim"),
        ("optim: {lr: 1.0, lr: 2.0}", "duplicate key lr"),
        ("optim: {lr: 1.0}\noptim.lr: 2.0", "optim.lr is given twice"),
        ("objective: {block_schedule: {1: [4], '1': [8]}}", "duplicate key 1"),
        ("optim: {}\nmodle: {}", "unknown key modle"),
        ("model: &a {layers: *a}", "recursive"),
    ],
)
def test_yaml_is_read_strictly(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"include: [data/docs]\n{line}\n" + ("" if line.startswith("run_dir") else "run_dir: x\n"))
    with pytest.raises(UserError, match=said):
        load_recipe(str(path), [])


def test_what_yaml_may_still_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes, exponents without a point, references, merge keys, a byte-order mark."""
    monkeypatch.setenv("WHERE", "010")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "\ufeffinclude: [data/docs]\nrun_dir: '010'\nseed: 1_000\noptim: &o {lr: 3e-4}\n"
        "train: {init_from: '${oc.env:WHERE}', total_steps: '${seed}', keep_every: }\n"
        "eval: {sets: {a: 'x/${seed}'}}\n"
    )
    run = load_recipe(str(path), [])
    assert (run.run_dir, run.seed, run.optim.lr, run.train.init_from) == ("010", 1000, 3e-4, "010")
    assert (run.train.total_steps, run.train.keep_every, run.eval.sets) == (1000, None, {"a": "x/1000"})


def test_one_set_is_added_and_all_are_replaced(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run_dir: r\ndata: {train: t}\neval: {sets: {a: x}}\n")
    assert load_recipe(str(recipe), ["eval.sets.b=y"]).eval.sets == {"a": "x", "b": "y"}
    assert load_recipe(str(recipe), ["eval.sets={b: y}"]).eval.sets == {"b": "y"}
