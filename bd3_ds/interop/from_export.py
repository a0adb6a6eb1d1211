"""Exports in the forms of other programs: a folder for Hugging Face, upstream's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bd3_ds.checkpoint.export import WEIGHTS, Export, load_weights
from bd3_ds.runtime.files import apply_umask, new_directory, write_json
from bd3_ds.runtime.run_dir import EVALUATIONS, EXPORTS


def write_hugging_face(export: Export, dst: Path) -> None:
    """Write the folder `dst` (`folder.py`), its card with the perplexities that the export's run has on record."""
    from bd3_ds.interop.folder import write_folder

    write_folder(export, dst, evaluations_of(export))


def evaluations_of(export: Export) -> list[dict[str, Any]]:
    """The export's lines of its run's records/eval.jsonl; none where it lies in no run."""
    from bd3_ds.runtime import records

    place = export.path.resolve()
    if place.parent.name != EXPORTS:
        return []
    needed = ("set", "ppl", "nelbo")
    lines = records.read(place.parent.parent / EVALUATIONS)
    return [line for line in lines if line.get("export") == place.name and all(key in line for key in needed)]


def write_upstream(export: Export, dst: Path) -> None:
    """Write config.json and model.safetensors as upstream's releases have them, without their code.

    Raises UserError where upstream's network is not that of the export, or the export is damaged.
    """
    import torch
    from safetensors.torch import save_file

    from bd3_ds.config.schema import block_size
    from bd3_ds.interop.bd3lms import their_name, upstream_config
    from bd3_ds.model.dit_config import dit_config

    run = export.run
    network = dit_config(run.model, run.objective.name)
    assert run.model.mask_id is not None
    config = upstream_config(network, run.objective.name, block_size(run), run.data.length, run.model.mask_id)
    weights = {their_name(name): tensor for name, tensor in load_weights(export).items()}
    # Upstream keeps these with the weights; they follow from the configuration.
    steps = torch.arange(0, network.head_width, 2, dtype=torch.float32) / network.head_width
    weights["backbone.rotary_emb.inv_freq"] = 1.0 / network.rope_base**steps
    for key in ("sampling_eps_min", "sampling_eps_max"):
        weights[key] = torch.tensor(config[key])
    with new_directory(dst, replace=True) as aside:
        save_file(weights, aside / WEIGHTS, {"format": "pt"})
        apply_umask(aside / WEIGHTS)
        write_json(aside / "config.json", config)
