"""`run.py convert --from upstream|hf SRC DST`: a model of upstream bd3lms, or a causal one, becomes an export."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.config.schema import RunConfig

SOURCES = ("upstream", "hf")
TARGETS = ("export",)


def main(argv: list[str]) -> int:
    """Read, check that every weight has its place, write."""
    options = _parser().parse(argv)
    for option, value, known in (("--from", options.source, SOURCES), ("--to", options.target, TARGETS)):
        if value not in known:
            raise UserError(f"{option} {value} is unknown; known for now: {', '.join(known)}")
    _require_free(options.dst, options.overwrite)
    convert = convert_causal if options.source == "hf" else convert_upstream
    convert(options.src, options.dst, options.tokenizer)
    print(f"wrote {options.dst}")
    return 0


def convert_upstream(src: Path, dst: Path, tokenizer: str | None = None) -> None:
    """Make the export `dst` from a folder with upstream's config.json and model.safetensors.

    `tokenizer` is what `load_tokenizer` takes. Raises UserError for files or keys that are missing or damaged and for
    weights that do not fit the configuration; then nothing is written.
    """
    if not src.is_dir():
        raise UserError(f"{src} is not a directory; give a folder with upstream's config.json and model.safetensors")
    from bd3_ds.model.convert import read_upstream, rename_upstream

    config, weights_path = read_upstream(src)
    run = upstream_run(config, src / "config.json", dst)
    _write(dst, run, rename_upstream(_read_weights(weights_path)), str(weights_path), tokenizer)


def convert_causal(src: Path, dst: Path, tokenizer: str | None = None) -> None:
    """Make the AR export `dst` from a folder with a causal model's config.json and safetensors (`model/causal.py`).

    Without a `tokenizer`, [MASK] is a new id behind the model's last. Errors as above.
    """
    from bd3_ds.checkpoint.tensors import read_tensors
    from bd3_ds.config.check import check_run
    from bd3_ds.config.load import load_defaults
    from bd3_ds.config.schema import AR
    from bd3_ds.data.tokenizer import load_tokenizer
    from bd3_ds.model.causal import MODEL_TYPES, causal_values, rename_causal, vocabulary_problem, with_mask
    from bd3_ds.runtime.errors import did_you_mean
    from bd3_ds.runtime.files import read_json

    path = src / "config.json"
    config = read_json(path, "a causal model's config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        raise UserError(f"{path} has model_type={kind}; {did_you_mean(str(kind), MODEL_TYPES)}")
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
    weights = rename_causal(read_tensors(src), kind, values["tie_embeddings"])
    _write(dst, run, with_mask(weights, vocab_size, vocab_size, mask_id), str(src), tokenizer)


def _write(dst: Path, run: RunConfig, weights: dict[str, Tensor], origin: str, tokenizer: str | None) -> None:
    from bd3_ds.checkpoint.export import fit_weights, write_export
    from bd3_ds.model.build import network_of
    from bd3_ds.model.dit import DiT

    fit_weights(DiT(network_of(run.model, run.objective.name)), weights, origin)
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "tokenizer" if tokenizer is not None else None
        if tokenizer is not None and saved is not None:
            _save_tokenizer(tokenizer, run, saved)
        write_export(dst, weights, run, saved, step=0)


def upstream_run(config: Any, path: Path, dst: Path) -> RunConfig:
    """The RunConfig of an upstream config.json (at `path`, for errors), defaults for all that it does not say."""
    from bd3_ds.config.check import check_run
    from bd3_ds.config.load import load_defaults
    from bd3_ds.config.schema import AR, BD3, SEDD
    from bd3_ds.model.convert import upstream_network, upstream_objective

    if not isinstance(config, dict):
        raise UserError(f"{path} must hold one JSON object; is this a bd3lms config.json?")
    objective = upstream_objective(config)
    missing = [key for key in ("model_length", *(["block_size"] if objective == BD3 else [])) if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is this a bd3lms config.json?")
    # A causal network has no conditioning, so that its width need not be told.
    network = upstream_network({"cond_dim": 128} | config if objective == AR else config, path)
    values = {
        "run_dir": str(dst),
        "data.train": "unknown",
        "data.length": config["model_length"],
        "objective.name": objective,
        "objective.block_size": config["block_size"] if objective == BD3 else None,
        "model.vocab_size": network.vocab_size,
        "model.mask_id": config.get("mask_index"),
        "model.hidden_size": network.hidden_size,
        "model.layers": network.layers,
        "model.heads": network.heads,
        "model.mlp_ratio": network.mlp_ratio,
        "model.cond_size": network.cond_size,
        "model.dropout": network.dropout,
        "model.rope_base": network.rope_base,
        "eval.estimator": "mc" if objective == SEDD else "stratified",
    }
    run = load_defaults(values, str(path))
    check_run(run, world_size=1)
    vocab_size, mask_id = run.model.vocab_size, run.model.mask_id
    assert vocab_size is not None
    if mask_id is None:
        return dataclasses.replace(run, model=dataclasses.replace(run.model, mask_id=vocab_size - 1))
    if not 0 <= mask_id < vocab_size:
        raise UserError(f"mask_index={mask_id} in {path} is not an id below vocab_size={vocab_size}")
    return run


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from None


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


def _require_free(dst: Path, overwrite: bool) -> None:
    """Refuse to replace what is there, unless it is an export and the user wants it."""
    if not dst.exists():
        return
    if not overwrite:
        raise UserError(f"{dst} already exists; choose another DST or add --overwrite")
    if not (dst / "export.json").is_file():
        raise UserError(f"{dst} is no export, so --overwrite leaves it alone; choose another DST")


def _parser() -> Parser:
    parser = Parser(prog="run.py convert", description="Models of other programs as exports of this one.")
    add = parser.add_argument
    add("src", type=Path, metavar="SRC", help="folder with config.json and safetensors")
    add("dst", type=Path, metavar="DST", help="the export to write")
    add(
        "--from",
        dest="source",
        required=True,
        metavar="|".join(SOURCES),
        help="upstream: kuleshov-group/bd3lms; hf: GPT-2 or Llama kinds",
    )
    add("--to", dest="target", default="export", metavar="|".join(TARGETS), help="default: export")
    add("--tokenizer", metavar="SPEC", help="directory, .model file or hub name; it goes into the export")
    add("--overwrite", action="store_true", help="replace an export at DST")
    return parser
