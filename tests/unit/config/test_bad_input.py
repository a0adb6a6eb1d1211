"""Every mistake at run.py ends with exit code 2 and one sentence that helps, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import run as entry
from bd3_ds.config.load import load_recipe
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.train.preflight import preflight
from tests.helpers.launch import launch_training
from tests.helpers.tiny import LENGTH, tiny_export, tiny_pack, tiny_run, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]

COMMAND = [
    ("trian recipe", ["unknown mode 'trian'", "did you mean 'train'?"]),
    ("42", ["unknown mode '42'", "known: check, convert, denoising, eval-worker"]),
    ("train", ["required: recipe", "run.py train --help"]),
    ("train @ --deepspeed-config x.json", ["--deepspeed-config", "did you mean '--deepspeed_config'?"]),
    ("train @ --deepspeed_config", ["--deepspeed_config", "expected one argument"]),
    ("check @ --world-size 0", ["--world-size", "'0' must be a whole number above 0"]),
    ("check @ --world-size two", ["--world-size", "'two' must be a whole number above 0"]),
    ("check @ --world_size 2", ["--world_size", "did you mean '--world-size'?"]),
    ("train {0}/recipes.yaml", ["recipes.yaml not found", "did you mean '{0}/recipe.yaml'?"]),
    ("train configs/recipes/doc_pretrain.yaml", ["did you mean 'configs/recipes/docs_pretrain.yaml'?"]),
    ("train {0}", ["cannot be read", "Is a directory"]),
    ("train {0}/binary.yaml", ["binary.yaml is not valid YAML"]),
    ("train {0}/broken.yaml", ["broken.yaml is not valid YAML", "line 2"]),
    ("train {0}/twice.yaml", ["twice.yaml is not valid YAML", "duplicate key optim"]),
    ("train {0}/list.yaml", ["list.yaml must hold 'key: value' lines"]),
    ("train {0}/include.yaml", ["include 'model/smal' in {0}/include.yaml", "did you mean 'model/small'?"]),
    ("train {0}/word.yaml", ["include in {0}/word.yaml must be a list"]),
    ("train {0}/itself.yaml", ["itself.yaml includes itself"]),
    ("train {0}/empty.yaml run_dir={0}/new", ["data.train has no value", "data.train=…"]),
]

OVERRIDES = [
    ("optim.lrr=1", ["unknown key optim.lrr", "did you mean 'optim.lr'?"]),
    ("optm.lr=1", ["unknown key optm.lr", "did you mean 'optim.lr'?"]),
    ("optim.lr", ["'optim.lr' is not an override; write key=value"]),
    ("=5", ["'=5' is not an override"]),
    ("optim.lr=fast", ["optim.lr=fast", "must be a number"]),
    ("train.total_steps=1.5", ["train.total_steps=1.5", "must be a whole number"]),
    ("train.total_steps=many", ["train.total_steps=many", "must be a whole number"]),
    ("data.shuffle=maybe", ["data.shuffle=maybe", "true or false"]),
    ("train=5", ["train in the command line must be a section", "such as train.total_steps"]),
    ("'model.hidden_size={{a: 1}}'", ["model.hidden_size", "must be a whole number"]),
    ("eval.sets=lambada", ["eval.sets=lambada", "'name: directory' pairs"]),
    ("optim.lr=1 optim.lr=2", ["optim.lr is given twice"]),
    ("optim.lr=[1", ["'optim.lr=[1' cannot be read"]),
    ("run_dir='${{nowhere}}'", ["cannot be read", "nowhere"]),
    ("run_dir=", ["run_dir is empty; name a directory"]),
    ("train.init_from=", ["train.init_from= has no value; write null for none"]),
    ("optim.lr=", ["optim.lr= has no value"]),
    ("train.total_steps=010", ["train.total_steps=010", "must be a whole number", "no leading zeros"]),
    ("train.total_steps=0x10", ["train.total_steps=0x10", "in decimal digits"]),
    ("optim.lr=1:30", ["optim.lr=1:30", "must be a number", "no base 60"]),
    ("data.shuffle=yes", ["data.shuffle=yes", "must be true or false"]),
    ("data.shuffle=1", ["data.shuffle=1", "must be true or false"]),
    ("model.layers=true", ["model.layers=true", "must be a whole number"]),
    ("train.total_steps=1e400", ["train.total_steps=1e400", "must be a whole number"]),
    ("optim.lr = 1e-3", ["'optim.lr = 1e-3' has spaces around '='; write optim.lr=1e-3"]),
    ("'optim.lr = 1e-3'", ["'optim.lr = 1e-3' has spaces around '='; write optim.lr=1e-3"]),
    ("data.train=~nobody-here/x", ["data.train=~nobody-here/x", "write ./~nobody-here/x"]),
    ("lr=1e-3", ["unknown key lr in the command line; did you mean 'optim.lr'?"]),
    ("name=mdlm", ["'objective.weight.name' or 'optim.name'?"]),
    ("zzzz=1", ["unknown key zzzz in the command line; configs/base.yaml lists all keys"]),
    ("'run_dir=\" \"'", ["run_dir is empty; name a directory"]),
    ("objective.name=bd4", ["objective.name=bd4 is unknown", "did you mean 'bd3'?"]),
    ("model.attention=sdp", ["model.attention=sdp is unknown", "did you mean 'sdpa'?"]),
    ("optim.name=adam", ["optim.name=adam is unknown", "did you mean 'adamw'?"]),
    ("optim.parameters.momentum=0.9", ["optim.parameters.momentum is unknown", "this optimizer takes none"]),
    ("optim.decay=linea", ["optim.decay=linea is unknown", "did you mean 'linear'?"]),
    ("train.fp32_matmul=tf32", ["train.fp32_matmul=tf32 is unknown", "known: high, highest"]),
    ("optim.lr=-1e-3", ["optim.lr=-0.001", "above 0"]),
    ("optim.lr=.nan", ["optim.lr=nan", "above 0"]),
    ("optim.weight_decay=.inf", ["optim.weight_decay=inf must be finite"]),
    ("optim.beta2=1", ["optim.beta2=1.0 must lie in [0, 1)"]),
    ("optim.min_lr=1", ["optim.min_lr=1.0 must not exceed optim.lr"]),
    ("optim.decay_share=0.2", ["optim.decay_share=0.2 needs optim.decay=linear or cosine"]),
    ("optim.decay=linear optim.decay_share=0", ["optim.decay_share=0.0 must lie in (0, 1]"]),
    ("seed=-1", ["seed=-1 must lie in 0 … 2^32 - 1"]),
    ("train.total_steps=0", ["train.total_steps=0", "above 0"]),
    ("objective.schedule.t_min=0.5 objective.schedule.t_max=0.2", ["t_min=0.5 and t_max=0.2", "t_min <= t_max"]),
    ("model.heads=3", ["model.hidden_size=32 must be a multiple of model.heads=3"]),
    ("model.heads=32", ["must be even"]),
    ("objective.block_size=5", ["objective.block_size=5 must divide data.length=16", "is 4"]),
    ("objective.block_size=64", ["objective.block_size=64 must divide data.length=16", "is 16"]),
    ("objective.name=mdlm", ["objective.block_size=4 belongs to objective.name=bd3, not mdlm; set it to null"]),
    (
        "objective.block_size=16 eval.estimator=exact",
        ["eval.estimator=exact", "at most 4,096 tokens, not a whole set", "use stratified"],
    ),
    ("objective.name=sedd objective.block_size=null", ["eval.estimator=stratified", "sedd", "use mc"]),
    ("eval.estimator=excat", ["eval.estimator=excat is unknown", "did you mean 'exact'?"]),
    ("eval.sample_length=32", ["eval.sample_length=32 must not exceed data.length=16"]),
    (
        "train.global_batch=5",
        ["train.global_batch=5", "train.micro_batch=2 x 1 ranks = 2; set train.micro_batch=1, or auto; or,"],
    ),
    ("train.micro_batch=many", ["train.micro_batch=many", "a whole number such as 1_000, or auto"]),
    ("train.micro_batch=-1", ["train.micro_batch=-1", "must be finite and above 0, or auto"]),
    ("train.global_batch=128", ["train.global_batch=128", "64 sequences"]),
    ("data.train={0}/nowhere", ["data.train", "'{0}/nowhere'", "data_prep.prepare"]),
    ("data.train={0}/trian", ["data pack not found: '{0}/trian'; did you mean '{0}/train'?"]),
    ("eval.sets.valid={0}/Valid", ["data pack not found: '{0}/Valid'; did you mean '{0}/valid'?"]),
    ("data.train={0}", ["'{0}' is not a data pack", "did you mean '{0}/"]),
    ("data.train={0}/folder", ["data.train", "'{0}/folder' is not a data pack"]),
    ("data.train=htp://host/pack", ["'htp://host/pack'", "unknown protocol 'htp'", "did you mean 'http'?"]),
    ("data.shuffle_algorithm=py1", ["data.shuffle_algorithm=py1 is unknown", "did you mean 'py1"]),
    ("data.cache_limit=big", ["data.cache_limit=big is no size", "100gb"]),
    ("data.cache_limit=1gb", ["data.cache_limit=1gb", "'{0}/train' is local", "null"]),
    ("data.predownload=0", ["data.predownload=0 must be finite and above 0"]),
    ("'data.mix={{ {0}/valid: 1.5}}'", ["'{0}/valid' the share 1.5", "below 1"]),
    ("'data.mix={{ {0}/valid: 0.5, {0}/long: 0.6}}'", ["sum to 1.1", "data.train"]),
    ("'data.mix={{ {0}/train: 0.5}}'", ["data.mix holds data.train='{0}/train' itself"]),
    ("'data.mix={{ {0}/./train/: 0.5}}'", ["data.mix: '{0}/./train/' and '{0}/train' are the same pack; leave it out"]),
    (
        "'data.mix={{ {0}/valid: 0.1, {0}/folder/../valid: 0.2}}'",
        ["'{0}/folder/../valid' and '{0}/valid' are the same pack; name it once, with the sum"],
    ),
    ("'data.mix={{ {0}/valid: 0.5}}' data.shuffle=false", ["data.mix needs data.shuffle=true"]),
    ("'data.mix={{ {0}/valid: 0.001}}'", ["'{0}/valid' the share 0.001, less than one sample"]),
    ("'data.mix={{ {0}/foreign: 0.5}}'", ["data.mix", "different tokenizers", "one --tokenizer"]),
    ("'data.mix={{ {0}/long: 0.5}}'", ["'{0}/long' has sequences of 32 tokens", "same --length"]),
    ("'data.mix={{ {0}/nowhere: 0.5}}'", ["data.mix: data pack not found: '{0}/nowhere'"]),
    ("data.mix=code", ["data.mix=code", "'name: number' pairs such as"]),
    ("data.train={0}/truncated", ["data.train", "shard.00000.mds.zstd has", "data_prep.verify {0}/truncated"]),
    ("data.length=32 'eval.sets={{}}'", ["data.length=32", "packed with length 16", "set data.length=16"]),
    ("eval.sets.valid={0}/nowhere", ["eval.sets.valid", "'{0}/nowhere'", "data_prep.prepare"]),
    ("eval.sets.valid={0}/truncated", ["eval.sets.valid", "shard.00000.mds.zstd has"]),
    ("eval.sets.valid={0}/foreign", ["eval.sets.valid", "different tokenizers", "one --tokenizer"]),
    ("eval.sets.valid={0}/long", ["eval.sets.valid={0}/long", "32 tokens", "same --length"]),
    ("'eval.sets={{a/b: {0}/valid}}'", ["eval.sets has the name 'a/b'"]),
    ("model.vocab_size=50258", ["model.vocab_size=50258", "the tokenizer of {0}/train", "leave it null"]),
    ("run_dir=/dev/null/x", ["run_dir", "cannot write to /dev/null/x", "Not a directory"]),
    ("run_dir={0}/binary.yaml", ["run_dir", "cannot write to {0}/binary.yaml"]),
    ("run_dir={0}/other", ["model.layers was 3", "is 2 now", "run_dir of its own"]),
    ("run_dir={0}/torn", ["run_dir", "torn/run.yaml is not complete", "it lacks data.train"]),
    ("train.init_from={0}/nowhere", ["train.init_from", "export {0}/nowhere not found"]),
    ("train.init_from={0}/folder", ["train.init_from", "neither an export nor a run"]),
    ("train.init_from={0}/other", ["train.init_from={0}/other", "model.layers=3, this run has 2"]),
    ("train.init_from={0}/other model.layers=3 model.heads=4", ["model.heads=2, this run has 4"]),
    ("train.init_from={0}/other model.layers=3 model.hidden_size=64", ["model.hidden_size=32, this run has 64"]),
    ("train.init_from={0}/ar", ["train.init_from={0}/ar", "objective.name=ar, this run has bd3"]),
    ("--deepspeed_config {0}/none.json", ["--deepspeed_config {0}/none.json not found", "json"]),
    ("--deepspeed_config {0}/batch.json", ["batch.json sets train_batch_size", "train.global_batch"]),
    ("--deepspeed_config {0}/stage.json", ["stage.json", "zero_optimization.stage", "0, 1, 2 or 3, not 4"]),
    ("--deepspeed_config {0}/zero.json", ["zero.json", "zero_optimization, which must be an object"]),
    ("--deepspeed_config {0}/broken.json", ["broken.json is not valid JSON", "line 1"]),
    ("--deepspeed_config {0}/list.yaml", ["list.yaml", "JSON"]),
]

EXPORTS = [
    ("evaluate", ["required: EXPORT"]),
    ("evaluate {0}/nowhere", ["export {0}/nowhere not found", "RUN_DIR/exports"]),
    ("evaluate {0}/folder", ["{0}/folder is neither an export nor a run with one"]),
    ("evaluate {0}/other --sets lambda", ["--sets lambda", "data_prep.prepare --source lambda"]),
    ("evaluate {0}/other --sets vald", ["--sets vald", "did you mean 'valid'?"]),
    ("evaluate {0}/other --sets valid={0}/nowhere", ["'{0}/nowhere'", "data_prep.prepare"]),
    ("evaluate {0}/other --estimator stratfied", ["--estimator stratfied", "did you mean 'stratified'?"]),
    ("evaluate {0}/sedd --estimator exact", ["--estimator=exact", "sedd", "use mc"]),
    ("evaluate {0}/other --views 0", ["--views", "'0' must be a whole number above 0"]),
    ("evaluate {0}/other --sts valid", ["--sts", "did you mean '--sets'?"]),
    ("evaluate {0}/other --json /dev/null/x/y.json", ["cannot write to /dev/null/x"]),
    ("evaluate {0}/format", ["{0}/format has export format 7"]),
    ("evaluate {0}/damaged", ["damaged/model.safetensors is damaged or missing"]),
    ("evaluate {0}/diverged", ["not finite (head.linear.weight)", "choose an earlier export"]),
    ("evaluate {0}/misfit", ["do not fit the model", "check model.* and objective.name"]),
    ("sample {0}/nowhere", ["export {0}/nowhere not found"]),
    ("sample {0}/damaged", ["damaged/model.safetensors is damaged or missing"]),
    ("sample {0}/other --num 0", ["--num", "'0' must be a whole number above 0"]),
    ("sample {0}/other --window 1", ["window=1 must be at least 2"]),
    ("sample {0}/other --temperature -1", ["temperature=-1.0"]),
    ("sample {0}/other --nucleus 2", ["nucleus=2.0 must lie in (0, 1]"]),
    ("sample {0}/other --seed -1", ["seed=-1"]),
    ("sample {0}/other --device tpu", ["--device", "'tpu'"]),
    ("report", ["required: RUN_DIR"]),
    ("report {0}/folder", ["{0}/folder"]),
    ("convert {0}/folder {0}/new", ["required: --from"]),
    ("convert --from hugface {0}/folder {0}/new", ["--from hugface"]),
    ("convert --from upstream {0}/nowhere {0}/new", ["{0}/nowhere is not a directory"]),
    ("convert --from upstream {0}/folder {0}/new", ["{0}/folder", "config.json"]),
    ("convert --from upstream {0}/folder {0}/other", ["{0}/other already exists"]),
    ("eval-worker", ["required: RUN_DIR"]),
    ("eval-worker {0}/folder --once", ["{0}/folder is not a run", "run.yaml"]),
    ("eval-worker {0}/other --poll 0", ["--poll", "'0' must be a whole number above 0"]),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good recipe with its packs, and around it what can be wrong."""
    root = tmp_path_factory.mktemp("bad-input")
    tiny_run(root)
    tiny_pack(root / "foreign", LENGTH, 8, tokenizer=tiny_tokenizer(90))
    tiny_pack(root / "long", 32, 8)
    shutil.copytree(root / "valid", root / "truncated")
    shard = next((root / "truncated").rglob("shard.*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for name, text in {
        "recipe.yaml": (root / "recipe.yaml").read_text(),
        "broken.yaml": "optim:\n  lr: [1\n",
        "twice.yaml": "optim: {lr: 1.0}\noptim: {lr: 2.0}\n",
        "list.yaml": "- a\n- b\n",
        "include.yaml": "include: [model/smal]\n",
        "word.yaml": "include: model/small\n",
        "itself.yaml": f"include: [{root / 'itself'}]\n",
        "empty.yaml": "",
        "owned.json": '{"optimizer": {"type": "Adam"}, "bf16": {"enabled": true}}',
        "batch.json": '{"train_batch_size": 8}',
        "stage.json": '{"zero_optimization": {"stage": 4}}',
        "zero.json": '{"zero_optimization": 2}',
        "broken.json": "{",
    }.items():
        (root / name).write_text(text)
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (root / "folder").mkdir()
    exports(root)
    return root


def exports(root: Path) -> None:
    """Runs with one export each; `other` and `torn` have a run.yaml too."""
    runs = {"other": "model.layers=3", "ar": "objective.name=ar", "sedd": "objective.name=sedd eval.estimator=mc"}
    for name, words in runs.items():
        size = [] if name == "other" else ["objective.block_size=null"]
        export = tiny_export(tiny_run(root, *words.split(), *size, run_dir=root / name))
        if name == "other":
            shutil.copy(export / "config.yaml", root / name / "run.yaml")
            for damage in ("format", "damaged", "misfit", "diverged"):
                shutil.copytree(export, root / damage)
    (root / "torn").mkdir()
    (root / "torn" / "run.yaml").write_text(f"run_dir: {root / 'torn'}\n")
    (root / "format" / "export.json").write_text('{"format": 7, "step": 2}')
    weights = root / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    config = root / "misfit" / "config.yaml"
    config.write_text(config.read_text().replace("layers: 3", "layers: 2"))
    spoil(root / "diverged" / "model.safetensors")


def spoil(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights["head.linear.weight"][0, 0] = float("nan")
    save_file(weights, file)


def words_of(line: str, work: Path) -> list[str]:
    return [word.replace("@", f"{work}/recipe.yaml") for word in shlex.split(line.format(work))]


def tree(root: Path) -> set[Path]:
    return set(root.rglob("*"))


# Training refuses these; a plan is made, and says so.
PLANNED = {
    "train.global_batch=5": "warning: train.micro_batch=2 x 1 ranks does not divide train.global_batch=5; planned with "
    "train.micro_batch=5, the largest that does and fits",
    "data.train={0}/nowhere": "warning: data not there yet: {0}/nowhere; vocabulary taken as the 81 tokens of the pack "
    "'valid'; shards unchecked",
    "'data.mix={{ {0}/nowhere: 0.5}}'": "warning: data not there yet: {0}/nowhere; shards unchecked",
    "eval.sets.valid={0}/nowhere": "warning: data not there yet: {0}/nowhere; shards unchecked",
    "run_dir={0}/other": "warning: {0}/other holds a run with other settings, which train would refuse: "
    "model.layers was 3 when {0}/other was started and is 2 now",
    "train.init_from={0}/nowhere": "warning: train.init_from={0}/nowhere is not there yet; its weights are unchecked",
}


@pytest.mark.parametrize(("overrides", "sentence"), PLANNED.items())
def test_a_plan_is_made_of_what_training_refuses_for_now(
    overrides: str, sentence: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(work)
    assert run_command(entry.main, words_of(f"check @ --no-dry-step {overrides}", work)) == 0
    said = capsys.readouterr()
    assert sentence.format(work) in " ".join(said.out.split()) and said.err == ""
    assert "ZeRO stage 2" in said.out.splitlines()[0] and "dry step" not in said.out
    assert tree(work) == before


def check(words: list[str], parts: list[str], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(work)
    assert run_command(entry.main, words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == "", said.err + said.out
    for part in parts:
        assert part.format(work) in said.err
    assert tree(work) == before


@pytest.mark.parametrize(("line", "parts"), [*COMMAND, *EXPORTS])
def test_sentence(line: str, parts: list[str], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(words_of(line, work), parts, work, capsys)


@pytest.mark.parametrize(
    ("mode", "overrides", "parts"),
    [
        (mode, *case)
        for mode in ("train", "check")
        for case in OVERRIDES
        if (mode, case[0] in PLANNED) != ("check", True)
    ],
)
def test_configuration(
    mode: str, overrides: str, parts: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(words_of(f"{mode} @ {overrides}", work), parts, work, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do what is refused here")
@pytest.mark.parametrize("mode", ["train", "check"])
def test_what_this_machine_cannot_do(mode: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(
        words_of(f"{mode} @ model.attention=flex", work),
        ["model.attention=flex", "use auto, dense, sdpa or stripes"],
        work,
        capsys,
    )
    check(words_of("evaluate {0}/other --device cuda", work), ["--device cuda", "use --device cpu"], work, capsys)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("optim.lrr=1 model.heads=x nonsense", ["optim.lrr", "model.heads=x", "'nonsense'"]),
        ("optim.lr=0 train.micro_batch=0 objective.name=x", ["optim.lr=0", "train.micro_batch=0", "objective.name=x"]),
        ("objective.block_size=3 model.heads=3 train.global_batch=3", ["block_size=3", "heads=3", "global_batch=3"]),
        ("model.vocab_size=1 model.mask_id=1", ["model.vocab_size=1", "model.mask_id=1"]),
        (
            "train.init_from={0}/ar run_dir=/dev/null/x eval.sets.valid={0}/long train.global_batch=128",
            ["train.global_batch=128", "eval.sets.valid", "train.init_from", "cannot write to /dev/null/x"],
        ),
        ("--deepspeed_config {0}/owned.json", ["sets optimizer", "sets bf16"]),
        (
            "--world-size 4 --nodes 3 --gpu h10-80g --mfu 2 --json {0} --deepspeed_config {0}/batch.json optim.lr=0 "
            "data.train={0}/truncated",
            [
                "--nodes=3 must divide --world-size=4",
                "--gpu=h10-80g is unknown; did you mean 'h100-80g'?",
                "argument --mfu: '2' must lie in (0, 1]",
                "--json {0} is a directory",
                "batch.json sets train_batch_size",
                "optim.lr=0",
                "data.train: data pack '{0}/truncated' is damaged",
            ],
        ),
        ("--world-size 0 --nodes two optim.lrr=1", ["--world-size: '0'", "--nodes: 'two'", "unknown key optim.lrr"]),
        (
            "--gpu h100-80g --world-size 12 train.global_batch=24",
            ["--world-size=12 does not fill whole nodes of 8 GPUs; say on how many --nodes"],
        ),
        (
            "--gpu h100-80g --world-size 4 --nodes 4 train.sequence_parallel=2",
            ["train.sequence_parallel=2 must divide the 1 ranks of a node"],
        ),
        pytest.param(
            "model.attention=flex optim.lr=0",
            ["model.attention=flex does not train on CPUs", "optim.lr=0"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do what is refused here"),
        ),
    ],
)
def test_all_problems_at_once(line: str, parts: list[str], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(entry.main, words_of(f"check @ {line}", work)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(parts) and all(sentence.startswith("error: ") for sentence in said)
    for part in parts:
        assert any(part.format(work) in sentence for sentence in said)


def test_continuing_needs_no_starting_weights(work: Path, tmp_path: Path) -> None:
    """What a run started from may be gone when it continues."""
    words = [f"run_dir={tmp_path}", f"train.init_from={work}/nowhere"]
    run = load_recipe(f"{work}/recipe.yaml", words)
    with pytest.raises(UserError, match="nowhere not found"):
        preflight(run, 1)
    committed = tmp_path / "checkpoints" / "step-00000002" / "manifest.json"
    committed.parent.mkdir(parents=True)
    committed.write_text("{}")
    assert preflight(run, 1)[0].model.vocab_size == 81


@pytest.mark.parametrize(
    "line",
    [
        "trian @",
        "train @ optim.lrr=1",
        "train @ data.train={0}/nowhere",
        "check @ --world-size 3",
        "evaluate {0}/nowhere",
        "evaluate {0}/other --estimator exakt",
        "sample {0}/nowhere",
        "report {0}/folder",
        "convert --from upstream {0}/nowhere {0}/new",
        "eval-worker {0}/folder --once",
    ],
)
def test_as_a_process(line: str, work: Path) -> None:
    command = [sys.executable, "run.py", *words_of(line, work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_torch_is_not_loaded_for_a_mistake(work: Path) -> None:
    """A wrong configuration costs a moment, not the import of torch."""
    lines = [
        "train @ optim.lrr=1",
        "check @ eval.sets.valid={0}/foreign",
        "train @ train.init_from={0}/other",
        "train @ run_dir={0}/other",
        "evaluate {0}/nowhere",
        "evaluate {0}/sedd --estimator exact",
    ]
    script = (
        "import json, sys; import run; from bd3_ds.runtime.errors import run_command\n"
        "assert all(run_command(run.main, words) == 2 for words in json.loads(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules"
    )
    argument = json.dumps([words_of(line, work) for line in lines])
    done = subprocess.run([sys.executable, "-c", script, argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(lines)


def test_under_the_launcher(work: Path) -> None:
    """Two ranks meet the same mistake, one says it, and the shell learns of it."""
    done = launch_training(work / "recipe.yaml", "optim.lrr=1", ranks=2)
    assert done.returncode == 2
    sentences = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert sentences == ["error: unknown key optim.lrr in the command line; did you mean 'optim.lr'?"]
    assert "Traceback" not in done.stdout and not (work / "run").exists()


def test_one_rank_of_a_host_looks_at_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its refusal ends the launch; a process alone looks whatever LOCAL_RANK says."""
    run = tiny_run(tmp_path)
    for shard in (tmp_path / "train").rglob("shard.*"):
        shard.unlink()
    for world_size, local_rank, looks in (("2", "0", True), ("2", "1", False), ("1", "1", True)):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(UserError, match="is missing") if looks else contextlib.nullcontext():
            preflight(run, 1)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("LOCAL_RANK")
    done = launch_training(tmp_path / "recipe.yaml", ranks=2)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("error: data.train: ")]) == 1


WORDS = st.text(alphabet="""optimlr.=[]{}$:'\\"1e-, \n!&*?|>%@`~#abc""", max_size=20)
ASSIGNMENTS = st.builds("{}={}".format, st.sampled_from(["optim.lr", "eval.sets", "model"]), WORDS)


@given(st.lists(WORDS | ASSIGNMENTS, max_size=3))
@example(["[=1"])
@settings(max_examples=60, deadline=None)
def test_no_override_crashes(words: list[str]) -> None:
    """Whatever the words: a configuration or a UserError."""
    with contextlib.suppress(UserError):
        load_recipe("configs/recipes/docs_pretrain.yaml", words)
