"""Opening models by path: an export, a run, or a bd3-ds folder for Hugging Face; no torch here."""

from __future__ import annotations

from pathlib import Path

from bd3_ds.checkpoint.export import Export, find_export
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

_OF_HUGGING_FACE = "config.json"


def open_export(place: str) -> Export:
    """The export at `place`, the newest one of the run there, or a folder of ours for Hugging Face, read as an export.

    Raises UserError where there is none of these.
    """
    path = Path(place)
    if not is_folder(path):
        return find_export(place)
    kind = read_json(path / _OF_HUGGING_FACE, _OF_HUGGING_FACE)
    kind = kind.get("model_type") if isinstance(kind, dict) else None
    if kind != "bd3-ds":
        raise UserError(
            f"{place} holds a model of model_type={kind}; make an export of it first: "
            f"run.py convert --from {'upstream' if kind in ('bd3lm', 'mdlm') else 'hf'} {place} EXPORT"
        )
    from bd3_ds.interop.folder import read_run

    run, step = read_run(path)
    return Export(path, step, run)


def is_folder(path: Path) -> bool:
    """Whether a model in Hugging Face's form lies there, and no export and no run."""
    return (path / _OF_HUGGING_FACE).is_file() and not (path / "export.json").is_file()
