"""Runs, packs and exports small enough for a test, made by the same functions as real ones."""

from __future__ import annotations

import dataclasses
import functools
import io
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bd3_ds.checkpoint.export import export_name, write_export
from bd3_ds.config.load import load_recipe
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.manifest import read_manifest
from bd3_ds.data.tokenizer import load_tokenizer
from bd3_ds.data.tokenizer_base import Tokenizer
from bd3_ds.model.build import dit_config
from bd3_ds.model.dit import DiT

LENGTH = 16


@functools.lru_cache(maxsize=1)
def tiny_text() -> list[str]:
    """Paragraphs of English prose that every Python has."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)[:20])
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


@functools.lru_cache(maxsize=4)
def tiny_tokenizer(vocabulary: int = 80) -> Tokenizer:
    """A sentencepiece model trained here, once a session for each size; [MASK] is one id more."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_text()),
        model_writer=model,
        vocab_size=vocabulary,
        model_type="bpe",
        character_coverage=0.98,
        minloglevel=2,
    )
    path = Path(tempfile.mkdtemp(prefix="tiny-tokenizer-")) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(str(path))


def tiny_pack(
    directory: Path, length: int = LENGTH, chunks: int = 8, seed: int = 0, tokenizer: Tokenizer | None = None
) -> Path:
    """A pack of `chunks` chunks of real text; another seed takes another part of it."""
    from data_prep.pack_writer import write_pack

    tokenizer = tokenizer or tiny_tokenizer()
    ids = np.concatenate([np.array(part) for part in tokenizer.encode_batch(tiny_text()) if part])
    ids = np.roll(ids, -997 * seed)
    rows = np.resize(ids, (chunks, length))
    write_pack(directory, ((row, np.array([0])) for row in rows), tokenizer, length, name=directory.name)
    return directory


def tiny_run(tmp_path: Path, *words: str, **overrides: Any) -> RunConfig:
    """A run under tmp_path: hidden 32, 2 layers, with key=value words and section__key=value.

    Packs `tmp_path/train` and `tmp_path/valid` are made if they are not there; the run directory is `tmp_path/run`.
    """
    pairs = [*words, *(f"{key.replace('__', '.')}={'null' if v is None else v}" for key, v in overrides.items())]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\n"
        "model: {hidden_size: 32, layers: 2, heads: 2, cond_size: 16, dropout: 0.0}\n"
        f"data: {{train: {tmp_path / 'train'}, length: {LENGTH}}}\n"
        "objective: {name: bd3, block_size: 4}\n"
        "optim: {warmup_steps: 2}\n"
        "train: {total_steps: 4, global_batch: 4, micro_batch: 2, precision: fp32, log_every: 1, "
        "checkpoint_every: 2, export_every: 2}\n"
        f"eval: {{sets: {{valid: {tmp_path / 'valid'}}}, batch: 8, samples: 0}}\n"
    )
    run = load_recipe(str(recipe), pairs)
    for name, seed, chunks in (("train", 0, 64), ("valid", 1, 8)):
        if not (tmp_path / name).exists():
            tiny_pack(tmp_path / name, run.data.length, chunks, seed)
    facts = read_manifest(tmp_path / "train").tokenizer
    model = dataclasses.replace(run.model, vocab_size=facts.vocab_size, mask_id=facts.mask_id)
    return dataclasses.replace(run, model=model)


def tiny_export(run: RunConfig, step: int = 2, seed: int = 0, scale: float = 0.2) -> Path:
    """An export of `run` whose weights are all random, so that no part of the network is idle; in RUN_DIR/exports."""
    network = DiT(dit_config(run.model, run.objective.name))
    generator = torch.Generator().manual_seed(seed + step)
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * scale for name, tensor in network.named_parameters()
    }
    path = Path(run.run_dir) / "exports" / export_name(step)
    return write_export(path, weights, run, Path(run.data.train) / "tokenizer", step)
