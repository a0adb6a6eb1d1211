"""Preflight checks, before torch is imported: configuration, shards, evaluation sets, directories."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from bd3_ds.checkpoint.manifest import MANIFEST as COMMITTED
from bd3_ds.checkpoint.manifest import checkpoint_directories
from bd3_ds.config.check import check_run, ranks_at_work
from bd3_ds.config.check_data import size_in_bytes
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.data_facts import DataFacts, PackFacts, read_data_facts
from bd3_ds.data.manifest import Manifest, check_same_tokenizer, read_manifest
from bd3_ds.data.shards import read_index
from bd3_ds.interop.init_from import find_start
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable
from bd3_ds.runtime.run_dir import CHECKPOINTS
from bd3_ds.train.earlier import earlier_runs, refused_changes


def preflight(run: RunConfig, world_size: int) -> tuple[RunConfig, DataFacts]:
    """The run with its vocabulary filled in from its data, and the facts of that; raises UserError with what is wrong.

    The facts of remote packs are then in data.cache.
    """
    check_run(run, world_size)
    facts = read_data_facts(run.data, _looks_at_files())
    run = with_vocabulary(run, facts.train.manifest)
    problems = [
        *_shards(run, facts.train.manifest),
        *_mix(run, facts),
        *_cache_limit(run, facts),
        *_sets(run, facts.train.manifest),
        *_start(run),
        *_run_dir(run),
    ]
    problems = problems or [*_clip_search(run, world_size), *_token_counts(run, facts.train)]
    if problems:
        raise UserError(*problems)
    return run, facts


def _looks_at_files() -> bool:
    """Whether this process looks at every shard: one rank of a host does, and launchers end the others with it."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"


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
    nodes = run.data.canonical_nodes
    if manifest.chunks // nodes * nodes < run.train.global_batch:
        problems.append(
            f"train.global_batch={run.train.global_batch} is more than the {manifest.chunks} sequences that "
            f"{run.data.train} holds; lower it or prepare more text"
        )
    return problems


def _mix(run: RunConfig, facts: DataFacts) -> list[str]:
    """Packs that are mixed are of one kind, none is named twice, and each has a sample in an epoch."""
    problems, first = _named_twice(facts), facts.train.manifest
    for (pack, share), mixed, count in zip(run.data.mix.items(), facts.packs[1:], facts.samples[1:], strict=True):
        other = mixed.manifest
        try:
            check_same_tokenizer(first, other)
        except UserError as error:
            problems.append(f"data.mix: {error}")
        if other.length != run.data.length:
            problems.append(
                f"data.mix: '{pack}' has sequences of {other.length} tokens, data.length is {run.data.length}; "
                "prepare it with the same --length"
            )
        if count == 0:
            problems.append(
                f"data.mix gives '{pack}' the share {share}, less than one sample beside the {first.chunks} of "
                "data.train; raise it or leave the pack out"
            )
    return problems


def _named_twice(facts: DataFacts) -> list[str]:
    """Packs under two spellings, which streaming would meet as two that use one directory."""
    problems = []
    seen: dict[Path, str] = {}
    for of in facts.packs:
        place = of.directory.resolve()
        if place not in seen:
            seen[place] = of.pack
            continue
        fix = "leave it out of data.mix, data.train has what the other shares leave"
        if seen[place] != facts.train.pack:
            fix = "name it once, with the sum of both shares"
        problems.append(f"data.mix: '{of.pack}' and '{seen[place]}' are the same pack; {fix}")
    return problems


def _cache_limit(run: RunConfig, facts: DataFacts) -> list[str]:
    """streaming wants room for four of the largest shard, packed and unpacked."""
    if run.data.cache_limit is None:
        return []
    largest = max(of.largest_shard for of in facts.packs)
    if (size_in_bytes(run.data.cache_limit) or 0) >= 4 * largest:
        return []
    return [
        f"data.cache_limit={run.data.cache_limit} is less than four times the largest shard, packed and unpacked "
        f"({4 * largest} bytes); raise it, the more the better, or set it to null"
    ]


def _sets(run: RunConfig, manifest: Manifest) -> list[str]:
    problems = []
    for name, directory in run.eval.sets.items():
        try:
            other = read_manifest(directory)
            if _looks_at_files():
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
    needed = max(run.train.micro_batch, 1) * world_size // run.train.sequence_parallel
    if min(there, search.sequences) >= needed:
        return []
    return [
        f"objective.clip_search.sequences={search.sequences} on set {search.set} ({there} sequences) is less than "
        f"train.micro_batch={run.train.micro_batch} x {ranks_at_work(run, world_size)} = {needed}, what one round of "
        "the grid search takes; raise it, or use objective.clip_search.method=moments"
    ]


def _token_counts(run: RunConfig, train: PackFacts) -> list[str]:
    """Masking by frequency finds its counts."""
    if run.objective.frequency.power == 0:
        return []
    try:
        _ = train.token_counts
    except UserError as error:
        return [f"objective.frequency.power={run.objective.frequency.power}: {error}"]
    return []


def _start(run: RunConfig) -> list[str]:
    """Problems with the weights that a run starts from; a run that continues needs them no more."""
    start = run.train.init_from
    checkpoints = checkpoint_directories(Path(run.run_dir) / CHECKPOINTS)
    if start is None or any((path / COMMITTED).is_file() for path in checkpoints):
        return []
    try:
        return find_start(run).problems(run)
    except UserError as error:
        return [f"train.init_from: {error}"]


def _run_dir(run: RunConfig) -> list[str]:
    """A run directory is writable and belongs to one run: another model, data order or batch may not continue it."""
    try:
        require_writable(Path(run.run_dir))
        earlier = earlier_runs(Path(run.run_dir))
    except UserError as error:
        return [f"run_dir: {message}" for message in error.messages]
    return refused_changes(earlier, run)
