"""Frozen evaluation sets: resolving names to packs, and checking that an export can score them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.data.manifest import MANIFEST, Manifest, read_manifest
from bd3_ds.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from bd3_ds.checkpoint.export import Export


def choose_sets(words: list[str] | None, export: Export, packs: Path | None) -> dict[str, str]:
    """Set name -> pack directory for the words NAME or NAME=DIR; all of the export's configuration for None.

    A NAME is looked up in the configuration, then as a directory in `packs`. Raises UserError for every word that
    names no pack, with the command that would make it.
    """
    configured = dict(export.run.eval.sets)
    if words is None:
        if not configured:
            raise UserError(f"{export.path} was trained without eval.sets; name what to score with --sets NAME=DIR")
        return configured
    chosen: dict[str, str] = {}
    problems = []
    for word in words:
        name, equals, directory = word.partition("=")
        if not name or (equals and not directory):
            problems.append(f"--sets: '{word}' is neither NAME nor NAME=DIR")
            continue
        if name in chosen:
            problems.append(f"--sets names {name} twice; keep one")
            continue
        found = directory or _look_up(name, configured, packs)
        if found is None:
            problems.append(_unknown(name, configured, export, packs))
        else:
            chosen[name] = found
    if problems:
        raise UserError(*problems)
    return chosen


def check_pack(export: Export, name: str, directory: str) -> Manifest:
    """The manifest of the pack; raises UserError where the export was not trained for its tokens or length."""
    manifest = read_manifest(directory)
    made_by, model = manifest.tokenizer, export.run.model
    again = (
        f"prepare the set again with --tokenizer {export.tokenizer or '(its own)'} --length {export.run.data.length}"
    )
    if (made_by.vocab_size, made_by.mask_id) != (model.vocab_size, model.mask_id):
        raise UserError(
            f"set {name} in {directory} has {made_by.vocab_size} tokens with [MASK] {made_by.mask_id}, the model of "
            f"{export.path} {model.vocab_size} with [MASK] {model.mask_id}; {again}"
        )
    if export.tokenizer is not None and made_by.fingerprint != _fingerprint(export.tokenizer):
        raise UserError(f"set {name} in {directory} was made with another tokenizer than {export.path}; {again}")
    if manifest.length != export.run.data.length:
        raise UserError(
            f"set {name} in {directory} has sequences of {manifest.length} tokens, the model of {export.path} reads "
            f"{export.run.data.length}; {again}"
        )
    return manifest


def _fingerprint(tokenizer: Path) -> str:
    from bd3_ds.data.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer)).fingerprint


def _look_up(name: str, configured: dict[str, str], packs: Path | None) -> str | None:
    places = [configured[name]] if name in configured else []
    places += [str(packs / name)] if packs is not None else []
    there = [place for place in places if (Path(place) / MANIFEST).is_file()]
    # A configured place stands even when nothing is there: reading it then says what is missing.
    return next(iter(there), configured.get(name))


def _unknown(name: str, configured: dict[str, str], export: Export, packs: Path | None) -> str:
    known = set(configured)
    if packs is not None and packs.is_dir():
        known |= {path.parent.name for path in packs.glob(f"*/{MANIFEST}")}
    hint = did_you_mean(name, known) if known else "no set is configured"
    where = f" nor in --packs {packs}" if packs is not None else ""
    return (
        f"--sets {name} is neither in eval.sets of {export.path}{where}; {hint} (or give {name}=DIR, or make it: "
        f"python -m data_prep.prepare --source {name} --tokenizer {export.tokenizer or 'TOKENIZER'} "
        f"--length {export.run.data.length} --out {packs or 'packs'}/{name})"
    )
