"""Models of other programs become exports: upstream's folders and Lightning files, causal models, folders of ours.

No code that comes with a model is run, and no pickle is: what is read is JSON, safetensors and, of Lightning files, the
tensors (`interop/lightning.py`).
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.config.schema import RunConfig

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


def convert_upstream(src: Path, dst: Path, tokenizer: str | None, words: list[str]) -> None:
    """Make the export `dst` from upstream's config.json and safetensors, or from a Lightning file of upstream.

    `tokenizer` is what `load_tokenizer` takes; `words`, key=value, tell of a Lightning file what it does not say.
    Raises UserError for files or keys that are missing or damaged and for weights that do not fit the configuration;
    then nothing is written.
    """
    from bd3_ds.interop.bd3lms import rename_upstream
    from bd3_ds.interop.safetensors import read_tensors
    from bd3_ds.runtime.files import read_json

    if src.is_file():
        _convert_lightning(src, dst, tokenizer, words)
        return
    _refuse_words(words, src)
    run = upstream_run(read_json(src / "config.json", "upstream config.json"), src / "config.json", dst)
    _write(dst, run, rename_upstream(read_tensors(src)), str(src), tokenizer)


def _convert_lightning(src: Path, dst: Path, tokenizer: str | None, words: list[str]) -> None:
    from bd3_ds.config.check import check_run
    from bd3_ds.config.load import load_defaults, override
    from bd3_ds.config.schema import AR, BD3
    from bd3_ds.interop.bd3lms import our_name, values_of_shapes
    from bd3_ds.interop.lightning import read_lightning

    model = read_lightning(src, our_name)
    values = values_of_shapes(model.shapes, src)
    causal = values["cond_size"] is None
    given = dict(word.partition("=")[::2] for word in words)
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
    run = override(load_defaults(fixed | of_model, str(src)), words, _SETTABLE)
    check_run(run, world_size=1)
    _write(dst, _with_mask_id(run, "--set model.mask_id={}"), model.read(), str(src), tokenizer)


def convert_hugging_face(src: Path, dst: Path, tokenizer: str | None, words: list[str]) -> None:
    """Make the export `dst` from a folder of ours for Hugging Face, equal to the one that the folder was made of, or
    from a causal model (`interop/hf_causal.py`). Errors as above.
    """
    from bd3_ds.interop.hf_causal import MODEL_TYPES
    from bd3_ds.runtime.errors import did_you_mean
    from bd3_ds.runtime.files import read_json

    _refuse_words(words, src)
    path = src / "config.json"
    config = read_json(path, "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "bd3-ds":
        _convert_folder(src, dst, tokenizer)
    elif kind in MODEL_TYPES:
        _convert_causal(src, config, dst, tokenizer)
    elif kind in ("bd3lm", "mdlm"):
        raise UserError(f"{path} has model_type={kind}, which is upstream's; use --from upstream")
    else:
        raise UserError(f"{path} has model_type={kind}; {did_you_mean(str(kind), ['bd3-ds', *MODEL_TYPES])}")


def _convert_folder(src: Path, dst: Path, tokenizer: str | None) -> None:
    from bd3_ds.interop.folder import read_folder

    folder = read_folder(src)
    if tokenizer is not None and folder.tokenizer is not None:
        raise UserError(f"{src} brings its own tokenizer; leave --tokenizer out")
    _write(dst, folder.run, folder.weights, str(src), tokenizer, folder.tokenizer, folder.step)


def _convert_causal(src: Path, config: dict[str, Any], dst: Path, tokenizer: str | None) -> None:
    """Without a `tokenizer`, [MASK] is a new id behind the model's last."""
    from bd3_ds.config.check import check_run
    from bd3_ds.config.load import load_defaults
    from bd3_ds.config.schema import AR
    from bd3_ds.data.tokenizer import load_tokenizer
    from bd3_ds.interop.hf_causal import causal_values, rename_causal, vocabulary_problem, with_mask
    from bd3_ds.interop.safetensors import read_tensors

    path = src / "config.json"
    length = min(1024, config.get("n_positions", config.get("max_position_embeddings", 1024)))
    values = causal_values(config, path, length)
    rows = config["vocab_size"]
    facts = load_tokenizer(tokenizer) if tokenizer is not None else None
    vocab_size, mask_id = (rows + 1, rows) if facts is None else (facts.vocab_size, facts.mask_id)
    special = {key: config[key] for key in config if key in ("eos_token_id", "bos_token_id", "pad_token_id")}
    if (problem := vocabulary_problem(rows, vocab_size, mask_id, special)) is not None:
        raise UserError(f"{path} {problem}")
    of_run = {"run_dir": str(dst), "data.train": "unknown", "data.length": length, "objective.name": AR}
    of_model = {f"model.{key}": value for key, value in values.items()}
    of_vocabulary = {"model.vocab_size": vocab_size, "model.mask_id": mask_id}
    run = load_defaults(of_run | of_model | of_vocabulary, str(path))
    check_run(run, world_size=1)
    weights = rename_causal(read_tensors(src), config["model_type"], values["tie_embeddings"])
    _write(dst, run, with_mask(weights, vocab_size, vocab_size, mask_id), str(src), tokenizer)


def upstream_run(config: Any, path: Path, dst: Path) -> RunConfig:
    """The RunConfig of an upstream config.json (at `path`, for errors), defaults for all that it does not say."""
    from bd3_ds.config.check import check_run
    from bd3_ds.config.load import load_defaults
    from bd3_ds.interop.bd3lms import upstream_network, upstream_objective

    if not isinstance(config, dict):
        raise UserError(f"{path} must hold one JSON object; is this a bd3lms config.json?")
    objective = upstream_objective(config)
    has_blocks = OBJECTIVES[objective].has_blocks
    missing = [key for key in ("model_length", *(["block_size"] if has_blocks else [])) if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is this a bd3lms config.json?")
    # A causal network has no conditioning, so that its width need not be told.
    network = upstream_network({"cond_dim": 128} | config if OBJECTIVES[objective].causal else config, path)
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


def _refuse_words(words: list[str], src: Path) -> None:
    if words:
        raise UserError(f"--set {words[0]} is for Lightning files; {src} has a config.json that says it")


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
                f"give the tokenizer that the model was trained with, or mend {what} in config.json"
            )
    tokenizer.save(directory)
