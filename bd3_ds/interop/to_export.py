"""Models of other programs become exports: upstream's folders and Lightning files, causal models, folders of ours."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.config.check import check_run
from bd3_ds.config.load import load_defaults, override
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AR, BD3, RunConfig
from bd3_ds.interop.hf_causal import MODEL_TYPES
from bd3_ds.interop.source import (
    CONFIG,
    OURS,
    CausalFolder,
    LightningFile,
    OurExport,
    OurFolder,
    UnknownFolder,
    UpstreamFolder,
    open_source,
)
from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.runtime.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

# What a Lightning file's shapes do not tell, with what one writes for it.
_UNTOLD = {"objective.name": "bd3", "objective.block_size": "16", "model.heads": "12", "data.length": "1024"}
_SETTABLE = (*_UNTOLD, "model.mask_id", "model.dropout")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_source(src: str, kind: str) -> Path:
    """The folder or file that SRC names, or what was fetched where it is a name on the hub; raises UserError."""
    path = Path(src)
    if path.exists():
        return path
    bare = kind == "hf" and re.fullmatch(r"[\w-]+", src)  # the hub's oldest models, such as gpt2, have no user
    if not bare and not _HUB_NAME.fullmatch(src):
        raise UserError(
            f"{src} is not a directory; give a folder with config.json and safetensors, or USER/NAME on the hub"
        )
    from bd3_ds.interop.transfer import fetch

    return fetch(src)


def convert_upstream(src: Path, dst: Path, tokenizer: str | None, overrides: list[str]) -> None:
    """Make the export `dst` from upstream's config.json and safetensors, or from a Lightning file of upstream.

    `tokenizer` is what `load_tokenizer` takes; `overrides`, key=value, are settings that a Lightning file lacks.
    Raises UserError for files or keys that are missing or damaged and for weights that do not fit the configuration;
    then nothing is written.
    """
    source = _open(src)
    if isinstance(source, LightningFile):
        _convert_lightning(source, dst, tokenizer, overrides)
        return
    _refuse_overrides(overrides, src)
    if not isinstance(source, UpstreamFolder):
        kind = source.model_type
        raise UserError(
            f"{src / CONFIG} has model_type={kind}, which is not upstream's (bd3lms or MDLM); use --from hf"
        )
    _write(dst, upstream_run(source, dst), source.weights(), str(src), tokenizer)


def convert_hugging_face(src: Path, dst: Path, tokenizer: str | None, overrides: list[str]) -> None:
    """Make the export `dst` from a folder of ours for Hugging Face, equal to the one that the folder was made of, or
    from a causal model (`hf_causal.py`). Errors as above.
    """
    source = _open(src)
    _refuse_overrides(overrides, src)
    if isinstance(source, OurFolder):
        _convert_folder(src, dst, tokenizer)
    elif isinstance(source, CausalFolder):
        _convert_causal(source, dst, tokenizer)
    elif isinstance(source, UpstreamFolder):
        kind = source.config.get("model_type")
        raise UserError(f"{src / CONFIG} has model_type={kind}, which is upstream's; use --from upstream")
    elif isinstance(source, LightningFile):
        raise UserError(f"{src} is a Lightning checkpoint of upstream's; use --from upstream")
    else:
        kind = source.model_type
        raise UserError(f"{src / CONFIG} has model_type={kind}; {did_you_mean(str(kind), [OURS, *MODEL_TYPES])}")


def _open(src: Path) -> LightningFile | UpstreamFolder | CausalFolder | OurFolder | UnknownFolder:
    """The source at `src`; raises UserError for a directory without a config.json and for exports."""
    if src.is_dir():
        read_json(src / CONFIG, CONFIG)
    source = open_source(src)
    if isinstance(source, OurExport):
        raise UserError(f"{src} is an export already; use --from export")
    return source


def _convert_lightning(source: LightningFile, dst: Path, tokenizer: str | None, overrides: list[str]) -> None:
    src, values, causal = source.path, source.values, source.causal
    given = dict(word.partition("=")[::2] for word in overrides)
    objective = given.get("objective.name", AR if causal else BD3)
    if OBJECTIVES[objective].causal != causal:
        raise UserError(
            f"--set objective.name={objective} does not fit {src}: it has {'no' if causal else 'a'} time conditioning"
        )
    needed = ["model.heads", "data.length"]
    needed += [] if causal else ["objective.name"]
    needed += ["objective.block_size"] if OBJECTIVES[objective].has_blocks else []
    if missing := [key for key in needed if key not in given]:
        examples = " ".join(f"--set {key}={_UNTOLD[key]}" for key in missing)
        raise UserError(
            f"the configuration in {src} is code and is not read; say how the model was trained, such as {examples}"
        )
    estimator = OBJECTIVES[objective].sampled_estimator
    of_model = {f"model.{key}": value for key, value in values.items() if value is not None}
    fixed = {"run_dir": str(dst), "data.train": "unknown", "objective.name": objective, "eval.estimator": estimator}
    run = override(load_defaults(fixed | of_model, str(src)), overrides, _SETTABLE)
    check_run(run, world_size=1)
    _write(dst, _with_mask_id(run, "--set model.mask_id={}"), source.weights(), str(src), tokenizer)


def _convert_folder(src: Path, dst: Path, tokenizer: str | None) -> None:
    from bd3_ds.interop.folder import read_folder

    folder = read_folder(src)
    if tokenizer is not None and folder.tokenizer is not None:
        raise UserError(f"{src} brings its own tokenizer; leave --tokenizer out")
    _write(dst, folder.run, folder.weights, str(src), tokenizer, folder.tokenizer, folder.step)


def _convert_causal(source: CausalFolder, dst: Path, tokenizer: str | None) -> None:
    """Without a `tokenizer`, [MASK] is a new id after the model's last."""
    from bd3_ds.data.tokenizer import load_tokenizer

    path, config = source.path / CONFIG, source.config
    length = min(1024, config.get("n_positions", config.get("max_position_embeddings", 1024)))
    values = source.values(length)
    rows = config["vocab_size"]
    facts = load_tokenizer(tokenizer) if tokenizer is not None else None
    vocab_size, mask_id = (rows + 1, rows) if facts is None else (facts.vocab_size, facts.mask_id)
    if (problem := source.vocabulary_problem(vocab_size, mask_id)) is not None:
        raise UserError(f"{path} {problem}")
    of_run = {"run_dir": str(dst), "data.train": "unknown", "data.length": length, "objective.name": AR}
    of_model = {f"model.{key}": value for key, value in values.items()}
    of_vocabulary = {"model.vocab_size": vocab_size, "model.mask_id": mask_id}
    run = load_defaults(of_run | of_model | of_vocabulary, str(path))
    check_run(run, world_size=1)
    _write(dst, run, source.weights(vocab_size, vocab_size, mask_id), str(source.path), tokenizer)


def upstream_run(source: UpstreamFolder, dst: Path) -> RunConfig:
    """The RunConfig of upstream's config.json, defaults for all that it does not say."""
    path, config, objective = source.path / CONFIG, source.config, source.objective
    has_blocks = OBJECTIVES[objective].has_blocks
    missing = [key for key in ("model_length", *(["block_size"] if has_blocks else [])) if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is this a bd3lms config.json?")
    network = source.network
    values = {
        "run_dir": str(dst),
        "data.train": "unknown",
        "data.length": config["model_length"],
        "objective.name": objective,
        "objective.block_size": config["block_size"] if has_blocks else None,
        "model.vocab_size": network.vocab_size,
        "model.mask_id": config.get("mask_index"),
        "model.hidden_size": network.hidden_size,
        "model.layers": network.layers,
        "model.heads": network.heads,
        "model.mlp_ratio": network.mlp_ratio,
        "model.cond_size": network.cond_size,
        "model.dropout": network.dropout,
        "model.rope_base": network.rope_base,
        "eval.estimator": OBJECTIVES[objective].sampled_estimator,
    }
    run = load_defaults(values, str(path))
    check_run(run, world_size=1)
    return _with_mask_id(run, f"mask_index={{}} in {path}")


def _with_mask_id(run: RunConfig, said: str) -> RunConfig:
    """The run with the last id of its vocabulary as the mask's where it has none.

    Raises UserError for one that is no token's, with `said` as its beginning.
    """
    vocab_size, mask_id = run.model.vocab_size, run.model.mask_id
    assert vocab_size is not None
    if mask_id is None:
        return dataclasses.replace(run, model=dataclasses.replace(run.model, mask_id=vocab_size - 1))
    if not 0 <= mask_id < vocab_size:
        raise UserError(f"{said.replace('{}', str(mask_id))} is not an id below vocab_size={vocab_size}")
    return run


def _refuse_overrides(overrides: list[str], src: Path) -> None:
    if overrides:
        raise UserError(f"--set {overrides[0]} is for Lightning files; {src} has a config.json that says it")


def _write(
    dst: Path,
    run: RunConfig,
    weights: dict[str, Tensor],
    origin: str,
    tokenizer: str | None,
    saved: Path | None = None,
    step: int = 0,
) -> None:
    """Write the export, with the tokenizer that the user names or with the files in `saved` as they are."""
    from bd3_ds.checkpoint.export import fit_weights, write_export
    from bd3_ds.interop.safetensors import require_finite
    from bd3_ds.model.build import dit_config
    from bd3_ds.model.dit import DiT

    fit_weights(DiT(dit_config(run.model, run.objective.name)), weights, origin)
    require_finite(weights, origin)
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer is not None:
            saved = Path(scratch) / "tokenizer"
            _save_tokenizer(tokenizer, run, saved)
        write_export(dst, weights, run, saved, step)


def _save_tokenizer(spec: str, run: RunConfig, directory: Path) -> None:
    from bd3_ds.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    for what, theirs, ours in (
        ("vocab_size", tokenizer.vocab_size, run.model.vocab_size),
        ("mask_index", tokenizer.mask_id, run.model.mask_id),
    ):
        if theirs != ours:
            raise UserError(
                f"--tokenizer {spec} does not fit the model: its {what} is {theirs}, the model's {ours}; "
                f"give the tokenizer that the model was trained with, or fix {what} in config.json"
            )
    tokenizer.save(directory)
