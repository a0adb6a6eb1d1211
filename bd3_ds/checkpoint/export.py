"""Exports: atomically written directories with averaged weights, configuration and tokenizer.

exports/step-00000300/   model.safetensors (EMA weights, fp32) · config.yaml · tokenizer/ · export.json

Finding an export and reading its configuration does not import torch; only its weights need that.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.config.load import load_resolved, to_yaml
from bd3_ds.config.plugins import require_plugins
from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import apply_umask, new_directory, read_json, write_json, write_text
from bd3_ds.runtime.run_dir import EXPORTS
from bd3_ds.runtime.step_names import step_name

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Export:
    """An export on disk: its directory, the optimizer step it was taken at, and the run that made it.

    `run.model.vocab_size` and `run.model.mask_id` are always set here.
    """

    path: Path
    step: int
    run: RunConfig

    @property
    def name(self) -> str:
        """The directory's own name, such as step-00000300."""
        return self.path.name

    @property
    def tokenizer(self) -> Path | None:
        """Directory for `load_tokenizer`, or None for a converted model that came without one."""
        directory = self.path / "tokenizer"
        return directory if directory.is_dir() else None


def export_name(step: int) -> str:
    """Names sort as steps do."""
    return step_name(step)


def write_export(path: Path, weights: dict[str, Tensor], run: RunConfig, tokenizer: Path | None, step: int) -> Path:
    """Write an export, flush it to the disk and commit it by a rename; an export of the same name is replaced."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from bd3_ds.checkpoint.shards import as_os_error

    with new_directory(path, replace=True) as aside:
        try:
            save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, aside / WEIGHTS)
        except SafetensorError as error:
            raise as_os_error(error) from None
        apply_umask(aside / WEIGHTS)
        write_text(aside / "config.yaml", to_yaml(run))
        if tokenizer is not None:
            shutil.copytree(tokenizer, aside / "tokenizer")
        write_json(aside / "export.json", {"format": FORMAT, "step": step})
    return path


def list_exports(run_dir: Path) -> list[Path]:
    """Committed exports of a run, oldest first."""
    return sorted(path for path in (run_dir / EXPORTS).glob("*") if _is_export(path) and not path.name.startswith("."))


def find_export(place: str) -> Export:
    """The export at `place`, or the newest one of the run at `place`; raises UserError where there is none."""
    path = Path(place)
    if not path.is_dir():
        raise UserError(f"export {place} not found; give a directory under RUN_DIR/exports, or RUN_DIR for its newest")
    if not _is_export(path):
        found = list_exports(path)
        if not found:
            raise UserError(f"{place} is neither an export nor a run with one (no export.json, no exports/step-*)")
        path = found[-1]
    meta = read_json(path / "export.json", "export.json")
    form = meta.get("format") if isinstance(meta, dict) else None
    if form != FORMAT:
        raise UserError(f"{path} has export format {form}; this version reads format {FORMAT}")
    run = load_resolved(path / "config.yaml")
    require_plugins(run.plugins, str(path))
    if not isinstance(meta.get("step"), int) or run.model.vocab_size is None or run.model.mask_id is None:
        raise UserError(f"{path} is damaged: it lacks its step, model.vocab_size or model.mask_id; export again")
    return Export(path, meta["step"], run)


def load_weights(export: Export) -> dict[str, Tensor]:
    """The export's tensors on the CPU; raises UserError where the file is damaged or a number is not finite."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(export.path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{export.path / WEIGHTS} is damaged or missing ({error}); export again") from None
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{export.path} holds weights that are not finite ({name}): the run diverged; choose an earlier export"
            )
    return weights


def fit_weights(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load `weights` into `model`, every one and no other; the UserError names the first that does not fit."""
    require_fit(model, weights, origin)
    model.load_state_dict(weights, strict=False)


def require_fit(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Raise UserError for the first of `weights` that `model` has not, in its shape, or lacks."""
    # Parameters, not the state: there a tied matrix would stand under two names.
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise UserError(
                f"weights in {origin} do not fit the model: {name} is {given.get(name, 'absent')} there, "
                f"{expected.get(name, 'absent')} here; check model.* and objective.name"
            )


def _is_export(path: Path) -> bool:
    return (path / "export.json").is_file()
