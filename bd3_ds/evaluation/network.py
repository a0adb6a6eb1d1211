"""Loading the network of an export."""

from __future__ import annotations

import dataclasses

import torch

from bd3_ds.checkpoint.export import Export, fit_weights, load_weights
from bd3_ds.evaluation.exports import is_folder
from bd3_ds.interop.safetensors import require_finite
from bd3_ds.model.build import dit_config
from bd3_ds.model.dit import DiT


def load_model(export: Export, device: torch.device) -> DiT:
    """The export's network in evaluation mode, dropout off, on `device`; raises UserError if the weights do not fit."""
    run = export.run
    if is_folder(export.path):
        from bd3_ds.interop.folder import read_folder

        weights = read_folder(export.path).weights
        require_finite(weights, str(export.path))
    else:
        weights = load_weights(export)
    model = DiT(dataclasses.replace(dit_config(run.model, run.objective.name), dropout=0.0))
    fit_weights(model, weights, str(export.path))
    return model.to(device).eval()
