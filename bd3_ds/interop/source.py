"""What kind of model lies at a place, and its weights under our names: the one reader of models of any origin.

Both `init_from` (a run's starting weights) and `to_export` (conversions) read through `open_source`. Recognising a
source and all that its configuration tells imports no torch; `weights` does. No code that comes with a model is run,
and no pickle is: what is read is JSON, safetensors and, of Lightning files, the tensors (`lightning.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.checkpoint.export import Export, find_export, load_weights
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.interop.bd3lms import our_name, rename_upstream, upstream_network, upstream_objective, values_of_shapes
from bd3_ds.interop.hf_causal import MODEL_TYPES, causal_values, rename_causal, vocabulary_problem, with_mask
from bd3_ds.interop.lightning import LightningModel, read_lightning
from bd3_ds.interop.safetensors import read_tensors, tensor_files
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
OURS = "bd3-ds"  # the model_type of what `convert --to hf` writes
UPSTREAM_TYPES = ("bd3lm", "mdlm")


@dataclass(frozen=True)
class OurExport:
    """An export, or a run's newest one."""

    export: Export

    def weights(self) -> dict[str, Tensor]:
        """Its tensors on the CPU; raises UserError where the file is damaged or a number is not finite."""
        return load_weights(self.export)


@dataclass(frozen=True)
class OurFolder:
    """What `convert --to hf` wrote (`folder.py`)."""

    path: Path

    @property
    def model_type(self) -> str:
        """As its config.json names it."""
        return OURS


@dataclass(frozen=True)
class UpstreamFolder:
    """config.json and safetensors of bd3lms or MDLM; reading a value raises UserError where its keys are missing."""

    path: Path
    config: dict[str, Any]

    @cached_property
    def objective(self) -> str:
        """The objective.name that the configuration stands for."""
        return upstream_objective(self.config)

    @cached_property
    def network(self) -> DiTConfig:
        """Its network. A causal one has no conditioning, so that its width need not be given."""
        config = {"cond_dim": 128} | self.config if OBJECTIVES[self.objective].causal else self.config
        return upstream_network(config, self.path / CONFIG)

    def require_files(self) -> None:
        """Raise UserError where files of the weights are missing."""
        tensor_files(self.path)

    def weights(self) -> dict[str, Tensor]:
        """Its tensors under our names; raises UserError for damaged files and weights that are not known."""
        return rename_upstream(read_tensors(self.path))


@dataclass(frozen=True)
class LightningFile:
    """A Lightning checkpoint of bd3lms. Its configuration is code and is not read: shapes tell all but the heads."""

    path: Path
    model: LightningModel
    values: dict[str, Any]  # of `model.*`; cond_size is None for AR

    @property
    def causal(self) -> bool:
        """Whether it is an AR model."""
        return self.values["cond_size"] is None

    def weights(self) -> dict[str, Tensor]:
        """Its averaged weights where it has them, else its weights; raises UserError for a damaged file."""
        return self.model.read()


@dataclass(frozen=True)
class CausalFolder:
    """A causal model of the GPT-2 or Llama kinds, as transformers saves it."""

    path: Path
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        """Which of `MODEL_TYPES` it is."""
        return str(self.config["model_type"])

    def values(self, length: int) -> dict[str, Any]:
        """What `model.*` must be for texts of `length` tokens; raises UserError for what our network does not have."""
        return causal_values(self.config, self.path / CONFIG, length)

    def vocabulary_problem(self, vocab_size: int, mask_id: int) -> str | None:
        """Why its embeddings do not serve such a tokenizer, or None."""
        named = ("eos_token_id", "bos_token_id", "pad_token_id")
        special = {key: self.config[key] for key in named if key in self.config}
        return vocabulary_problem(self.config["vocab_size"], vocab_size, mask_id, special)

    def require_files(self) -> None:
        """Raise UserError where files of the weights are missing."""
        tensor_files(self.path)

    def weights(self, vocab_size: int, vocab_rows: int, mask_id: int) -> dict[str, Tensor]:
        """Its tensors under our names, embeddings [vocab_rows, D] with a row for [MASK]; raises UserError as above."""
        tied = self.values(0)["tie_embeddings"]  # which does not depend on the length
        weights = rename_causal(read_tensors(self.path), self.model_type, tied)
        return with_mask(weights, vocab_size, vocab_rows, mask_id)


@dataclass(frozen=True)
class UnknownFolder:
    """A model of a kind that is not read here."""

    path: Path
    model_type: Any


Source = OurExport | OurFolder | UpstreamFolder | LightningFile | CausalFolder | UnknownFolder


def open_source(place: str | Path) -> Source:
    """What lies at `place`: a file is a Lightning checkpoint; a folder with a config.json, that of an export aside, a
    model in Hugging Face's form; any other directory an export or a run.

    Raises UserError where nothing readable is there.
    """
    path = Path(place)
    if path.is_file():
        model = read_lightning(path, our_name)
        return LightningFile(path, model, values_of_shapes(model.shapes, path))
    if not (path / CONFIG).is_file() or (path / "export.json").is_file():
        return OurExport(find_export(str(place)))
    config = read_json(path / CONFIG, CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} must hold one JSON object")
    kind = config.get("model_type")
    if kind in MODEL_TYPES:
        return CausalFolder(path, config)
    if kind == OURS:
        return OurFolder(path)
    if kind is None or kind in UPSTREAM_TYPES or "n_blocks" in config:
        return UpstreamFolder(path, config)
    return UnknownFolder(path, kind)
