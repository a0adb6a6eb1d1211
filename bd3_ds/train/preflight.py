"""Everything that can be found wrong with a run before torch is imported: configuration, shards, sets, directories."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bd3_ds.config.check import check_run
from bd3_ds.config.load import flat, load_resolved
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.pack import Manifest, check_same_tokenizer, read_index, read_manifest
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable

# What a run may not change between its start and its continuation.
_FIXED = ("model.", "data.", "objective.", "seed", "train.global_batch", "train.precision")
_FREE = ("data.workers", "data.train", "model.attention")


def preflight(run: RunConfig, world_size: int) -> RunConfig:
    """The run with its vocabulary filled in from the shards; raises UserError with what is wrong."""
    check_run(run, world_size)
    manifest = read_manifest(run.data.train)
    read_index(run.data.train)
    run = with_vocabulary(run, manifest)
    problems = [*_shards(run, manifest), *_sets(run, manifest)]
    if problems:
        raise UserError(*problems)
    require_writable(Path(run.run_dir))
    _same_run(run)
    return run


def with_vocabulary(run: RunConfig, manifest: Manifest) -> RunConfig:
    """Fill in model.vocab_size and model.mask_id; raises UserError where the recipe contradicts the tokenizer."""
    facts = manifest.tokenizer
    for key, given, known in (
        ("model.vocab_size", run.model.vocab_size, facts.vocab_size),
        ("model.mask_id", run.model.mask_id, facts.mask_id),
    ):
        if given is not None and given != known:
            raise UserError(f"{key}={given} does not match the tokenizer of {run.data.train}, which has {known}; leave it null")
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
            f"{run.data.train} holds {manifest.chunks} sequences, fewer than train.global_batch={run.train.global_batch}; "
            "lower it or prepare more text"
        )
    return problems


def _sets(run: RunConfig, manifest: Manifest) -> list[str]:
    problems = []
    for name, directory in run.eval.sets.items():
        try:
            other = read_manifest(directory)
            check_same_tokenizer(manifest, other)
        except UserError as error:
            problems.append(f"eval.sets.{name}: {error}")
            continue
        if other.length != run.data.length:
            problems.append(
                f"eval.sets.{name}={directory} has sequences of {other.length} tokens, data.length is {run.data.length}; "
                "prepare the set with the same --length"
            )
    return problems


def _same_run(run: RunConfig) -> None:
    """A run directory belongs to one run: continuing it with another model, data order or batch is refused."""
    path = Path(run.run_dir) / "run.yaml"
    if not path.is_file():
        return
    before, now = flat(load_resolved(path)), flat(run)
    problems = [
        f"{key} was {before[key]} when {run.run_dir} was started and is {now[key]} now; "
        "set it back, or give the new run a run_dir of its own"
        for key in now
        if key.startswith(_FIXED) and not key.startswith(_FREE) and before[key] != now[key]
    ]
    if problems:
        raise UserError(*problems)
