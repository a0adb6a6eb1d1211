"""Everything that can be found wrong with a run before torch is imported: configuration, shards, sets, directories."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.check import check_run
from bd3_ds.config.load import flat, load_resolved
from bd3_ds.config.schema import AR, RunConfig
from bd3_ds.data.pack import Manifest, check_same_tokenizer, read_index, read_manifest, read_token_counts
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable

# What a run may not change between its start and its continuation.
_FIXED = ("model.", "data.", "objective.", "seed", "train.global_batch", "train.precision")
_FREE = ("data.workers", "data.train", "model.attention")

# What two models must share for the weights of one to mean the same in the other.
_SHAPE = ("hidden_size", "layers", "heads", "mlp_ratio", "cond_size", "rope_base", "vocab_size", "mask_id")


def preflight(run: RunConfig, world_size: int) -> RunConfig:
    """The run with its vocabulary filled in from the shards; raises UserError with what is wrong."""
    check_run(run, world_size)
    try:
        manifest = read_manifest(run.data.train)
        read_index(run.data.train)
    except UserError as error:
        raise UserError(f"data.train: {error}") from None
    run = with_vocabulary(run, manifest)
    problems = [*_shards(run, manifest), *_sets(run, manifest), *_start(run), *_run_dir(run)]
    problems = problems or [*_clip_search(run, world_size), *_token_counts(run)]
    if problems:
        raise UserError(*problems)
    return run


def with_vocabulary(run: RunConfig, manifest: Manifest) -> RunConfig:
    """Fill in model.vocab_size and model.mask_id; raises UserError where the recipe contradicts the tokenizer."""
    facts = manifest.tokenizer
    problems = [
        f"{key}={given} does not match the tokenizer of {run.data.train}, which has {known}; leave it null"
        for key, given, known in (
            ("model.vocab_size", run.model.vocab_size, facts.vocab_size),
            ("model.mask_id", run.model.mask_id, facts.mask_id),
        )
        if given is not None and given != known
    ]
    if problems:
        raise UserError(*problems)
    model = dataclasses.replace(run.model, vocab_size=facts.vocab_size, mask_id=facts.mask_id)
    return dataclasses.replace(run, model=model)


def _shards(run: RunConfig, manifest: Manifest) -> list[str]:
    problems = []
    if manifest.length != run.data.length:
        problems.append(
            f"data.length={run.data.length} but {run.data.train} was packed with length {manifest.length}; "
            f"set data.length={manifest.length} or prepare the text again"
        )
    if manifest.chunks < run.train.global_batch:
        problems.append(
            f"train.global_batch={run.train.global_batch} is more than the {manifest.chunks} sequences that "
            f"{run.data.train} holds; lower it or prepare more text"
        )
    return problems


def _sets(run: RunConfig, manifest: Manifest) -> list[str]:
    problems = []
    for name, directory in run.eval.sets.items():
        try:
            other = read_manifest(directory)
            read_index(directory)
            check_same_tokenizer(manifest, other)
        except UserError as error:
            problems.append(f"eval.sets.{name}: {error}")
            continue
        if other.length != run.data.length:
            problems.append(
                f"eval.sets.{name}={directory} has sequences of {other.length} tokens, data.length is "
                f"{run.data.length}; prepare the set with the same --length"
            )
    return problems


def _clip_search(run: RunConfig, world_size: int) -> list[str]:
    """The grid search gives every rank a whole micro-batch at least."""
    search = run.objective.clip_search
    if search.method != "grid":
        return []
    there = read_manifest(run.eval.sets[search.set]).chunks
    needed = run.train.micro_batch * world_size
    if min(there, search.sequences) >= needed:
        return []
    return [
        f"objective.clip_search.sequences={search.sequences} on set {search.set} ({there} sequences) is less than "
        f"train.micro_batch={run.train.micro_batch} x {world_size} ranks = {needed}, what one round of the grid search "
        "takes; raise it, or use objective.clip_search.method=moments"
    ]


def _token_counts(run: RunConfig) -> list[str]:
    """Masking by frequency finds its counts."""
    if run.objective.frequency.power == 0:
        return []
    try:
        read_token_counts(run.data.train)
    except UserError as error:
        return [f"objective.frequency.power={run.objective.frequency.power}: {error}"]
    return []


def _start(run: RunConfig) -> list[str]:
    """Problems with the weights that a run starts from; a run that continues needs them no more."""
    start = run.train.init_from
    if start is None or any(Path(run.run_dir).glob("checkpoints/step-*/manifest.json")):
        return []
    try:
        export = find_export(start)
    except UserError as error:
        return [f"train.init_from: {error}"]
    objective = export.run.objective.name
    if (objective == AR) != (run.objective.name == AR):
        return [
            f"train.init_from={start} holds a model of objective.name={objective}, this run has {run.objective.name}: "
            "one reads from left to right, the other both ways; start from another export"
        ]
    return [
        f"train.init_from={start} holds a model with model.{key}={theirs}, this run has {ours}; "
        "make the two equal or start from another export"
        for key in _SHAPE
        if (theirs := getattr(export.run.model, key)) != (ours := getattr(run.model, key))
        and not (objective == AR and key == "cond_size")
    ]


def _run_dir(run: RunConfig) -> list[str]:
    """A run directory is writable and belongs to one run: another model, data order or batch may not continue it."""
    path = Path(run.run_dir) / "run.yaml"
    try:
        require_writable(Path(run.run_dir))
        if not path.is_file():
            return []
        before = flat(load_resolved(path))
    except UserError as error:
        return [f"run_dir: {message}" for message in error.messages]
    now = flat(run)
    return [
        f"{key} was {before[key]} when {run.run_dir} was started and is {now[key]} now; "
        "set it back, or give the new run a run_dir of its own"
        for key in now
        if key.startswith(_FIXED) and not key.startswith(_FREE) and before[key] != now[key]
    ]
