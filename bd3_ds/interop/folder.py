"""A folder for Hugging Face from an export, and the export back from such a folder, with nothing lost between.

FOLDER/   config.json · model.safetensors · README.md · tokenizer files for AutoTokenizer · the modelling code
          tokenizer/   the export's own tokenizer, as it was

Reading such a folder runs none of its code: it needs the JSON and the tensors.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.checkpoint.export import WEIGHTS, Export, load_weights
from bd3_ds.config.load import from_values
from bd3_ds.config.plugins import require_plugins
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.data.streaming_import import stub_torchvision
from bd3_ds.data.tokenizer import load_tokenizer
from bd3_ds.interop.card import model_card
from bd3_ds.interop.safetensors import read_tensors
from bd3_ds.interop.tokenizer import write_auto_tokenizer
from bd3_ds.model.dit_config import dit_config
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import apply_umask, new_directory, read_json, write_text

stub_torchvision()  # before transformers imports it

from bd3_ds.interop.modeling_bd3_ds import BD3Config, BD3ForCausalLM, BD3ForMaskedLM  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = BD3Config.model_type
TOKENIZER = "tokenizer"

_PREFIX = "network."


@dataclasses.dataclass(frozen=True)
class Folder:
    """What such a folder holds of an export; `tokenizer` is a directory, or None where the export had none."""

    run: RunConfig
    step: int
    weights: dict[str, Tensor]
    tokenizer: Path | None


def write_folder(export: Export, dst: Path, evaluations: list[dict[str, Any]]) -> None:
    """Write `dst`, replacing what is there. `evaluations` are the export's lines of records/eval.jsonl, for the card.

    Raises UserError where the export's weights are damaged or not finite.
    """
    from safetensors.torch import save_file

    weights = {_PREFIX + name: tensor for name, tensor in load_weights(export).items()}
    config = config_of(export)
    with new_directory(dst, replace=True) as aside:
        save_file(weights, aside / WEIGHTS, {"format": "pt"})
        apply_umask(aside / WEIGHTS)
        config.save_pretrained(aside)
        unlike = None
        if export.tokenizer is not None:
            unlike = write_auto_tokenizer(export.tokenizer, aside, export.run.data.length)
            shutil.copytree(export.tokenizer, aside / TOKENIZER)
        parameters = sum(tensor.numel() for tensor in weights.values())
        write_text(aside / "README.md", model_card(export, evaluations, parameters, unlike))


def config_of(export: Export) -> BD3Config:
    """The export's config.json."""
    run = export.run
    network = dataclasses.asdict(dit_config(run.model, run.objective.name))
    del network["causal"]  # it follows from the objective
    special = {}
    if export.tokenizer is not None:
        tokenizer = load_tokenizer(str(export.tokenizer))
        special = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
    return BD3Config(
        objective=run.objective.name,
        block_size=block_size(run),
        length=run.data.length,
        mask_token_id=run.model.mask_id,
        run=dataclasses.asdict(run),
        step=export.step,
        architectures=[(BD3ForCausalLM if OBJECTIVES[run.objective.name].causal else BD3ForMaskedLM).__name__],
        dtype="float32",
        **network | {"biases": list(network["biases"])},
        **special,
    )


def read_folder(src: Path) -> Folder:
    """What `write_folder` (or `save_pretrained`) wrote; raises UserError for what is missing or damaged."""
    run, step = read_run(src)
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(src).items()}
    tokenizer = src / TOKENIZER
    return Folder(run, step, weights, tokenizer if tokenizer.is_dir() else None)


def read_run(src: Path) -> tuple[RunConfig, int]:
    """The run of such a folder and the step of its weights; raises UserError for what is missing or damaged."""
    path = src / "config.json"
    content = read_json(path, "config.json")
    if not isinstance(content.get("run"), dict) or not isinstance(content.get("step"), int):
        raise UserError(
            f"{path} lacks run or step, the configuration of the training run; was it made by this program?"
        )
    run = from_values(content["run"], f"run in {path}")
    require_plugins(run.plugins, str(src))
    network = dataclasses.asdict(dit_config(run.model, run.objective.name))
    for key, value in network.items():
        given = content.get(key, value)
        if given != (list(value) if isinstance(value, tuple) else value):
            raise UserError(f"{path} says {key}={given}, but {value} in its run; make the two equal")
    if run.model.vocab_size is None or run.model.mask_id is None:
        raise UserError(f"{path} lacks model.vocab_size or model.mask_id in its run; was it made by this program?")
    return run, content["step"]
