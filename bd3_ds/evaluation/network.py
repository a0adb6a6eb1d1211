"""From an export on disk to its network, ready to score and to sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.checkpoint.export import Export, find_export, fit_weights, load_weights
from bd3_ds.checkpoint.tensors import require_finite
from bd3_ds.model.build import network_of
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

if TYPE_CHECKING:
    import torch

_OF_HUGGING_FACE = "config.json"


def open_export(place: str) -> Export:
    """The export at `place`, the newest one of the run there, or a folder of ours for Hugging Face, read as an export.

    Raises UserError where there is none of these.
    """
    path = Path(place)
    if not _is_folder(path):
        return find_export(place)
    kind = read_json(path / _OF_HUGGING_FACE, _OF_HUGGING_FACE)
    kind = kind.get("model_type") if isinstance(kind, dict) else None
    if kind != "bd3-ds":
        raise UserError(
            f"{place} holds a model of model_type={kind}; make an export of it first: "
            f"run.py convert --from {'upstream' if kind in ('bd3lm', 'mdlm') else 'hf'} {place} EXPORT"
        )
    from bd3_ds.hub.folder import read_run

    run, step = read_run(path)
    return Export(path, step, run)


def load_model(export: Export, device: torch.device) -> DiT:
    """The export's network in evaluation mode, dropout off, on `device`; raises UserError if the weights do not fit."""
    run = export.run
    if _is_folder(export.path):
        from bd3_ds.hub.folder import read_folder

        weights = read_folder(export.path).weights
        require_finite(weights, str(export.path))
    else:
        weights = load_weights(export)
    model = DiT(dataclasses.replace(network_of(run.model, run.objective.name), dropout=0.0))
    fit_weights(model, weights, str(export.path))
    return model.to(device).eval()


def _is_folder(path: Path) -> bool:
    """Whether a model in Hugging Face's form lies there, and no export and no run."""
    return (path / _OF_HUGGING_FACE).is_file() and not (path / "export.json").is_file()
