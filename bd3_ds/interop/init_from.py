"""Resolves train.init_from: the weights that a run starts from, and whether they fit it.

An export (or run) of ours, upstream bd3lms as a folder or a Lightning file, or a causal model of the GPT-2 or Llama
kinds, which starts AR runs as it is and diffusion runs by adaptation (`source.py` reads them all). Finding a start and
comparing it with the run imports no torch; reading its weights does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AR, ModelConfig, RunConfig
from bd3_ds.interop.hf_causal import MODEL_TYPES
from bd3_ds.interop.safetensors import require_finite
from bd3_ds.interop.source import (
    CONFIG,
    CausalFolder,
    LightningFile,
    OurExport,
    OurFolder,
    UnknownFolder,
    UpstreamFolder,
    open_source,
)
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.model.build import Initializer
    from bd3_ds.model.dit import DiT

# What two models must share for the weights of one to mean the same in the other, where the source tells it.
_SHAPE = (
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "mlp",
    "mlp_size",
    "norm",
    "norm_eps",
    "biases",
    "positions",
    "max_positions",
    "rope_base",
    "tie_embeddings",
    "cond_size",
    "vocab_size",
    "vocab_multiple",
    "mask_id",
)
_FOLLOWS = {"kv_heads": "heads", "mlp_size": "hidden_size"}  # by default; one sentence is then enough
_UPSTREAM = {
    "kv_heads": None,
    "mlp": "gelu",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "biases": ["mlp", "head"],
    "positions": "rotary",
    "rope_base": 10_000.0,
    "tie_embeddings": False,
    "vocab_multiple": 1,
}


@dataclass(frozen=True)
class Start:
    """A source of weights: `values` are the `model.*` that the run must have, `objective` what it was trained for.

    `adapts`: a causal model that may start a diffusion run. `more` are problems that no single key fixes. `read` gives
    the weights under our names and what to say about them.
    """

    path: Path
    objective: str
    values: dict[str, Any]
    read: Callable[[DiT], tuple[dict[str, Tensor], str]]
    adapts: bool = False
    more: list[str] = field(default_factory=list)

    def problems(self, run: RunConfig) -> list[str]:
        """Why the run cannot start from here, in sentences that name the keys to set."""
        name = f"train.init_from={run.train.init_from}"
        causal = self.objective in OBJECTIVES and OBJECTIVES[self.objective].causal
        if causal != OBJECTIVES[run.objective.name].causal and not self.adapts:
            return [
                f"{name} holds a model of objective.name={self.objective}, this run has {run.objective.name}: "
                "one reads from left to right, the other both ways; start from another export"
            ]
        theirs, ours = _complete(self.values), _complete(vars(run.model))
        unlike = [
            key for key in _SHAPE if key in theirs and theirs[key] != ours[key] and not (key == "cond_size" and causal)
        ]
        if self.adapts and unlike:
            words = " ".join(f"model.{key}={_shown(theirs[key])}" for key in unlike)
            have = " ".join(f"{key}={_shown(ours[key])}" for key in unlike)
            return [f"{name} needs {words}; this run has {have}", *self.more]
        return self.more + [
            f"{name} holds a model with model.{key}={_shown(theirs[key])}, this run has {_shown(ours[key])}; "
            "make the two equal or start from another export"
            for key in unlike
            if _FOLLOWS.get(key) not in unlike
        ]


def find_start(run: RunConfig) -> Start:
    """The source that train.init_from names; raises UserError where it is none, or one that we cannot use."""
    assert run.train.init_from is not None
    source = open_source(run.train.init_from)
    if isinstance(source, OurExport):
        return _export(source)
    if isinstance(source, UpstreamFolder):
        return _upstream(source)
    if isinstance(source, LightningFile):
        return _lightning(source)
    if isinstance(source, CausalFolder):
        return _causal(source, run)
    config = source.path / CONFIG
    if isinstance(source, OurFolder):
        raise UserError(f"{config} is in Hugging Face's form; make an export of it first: run.py convert --from hf")
    assert isinstance(source, UnknownFolder)
    raise UserError(f"{config} has model_type={source.model_type}; known are bd3lms' own and {', '.join(MODEL_TYPES)}")


def starting_weights(start: Start, model: DiT) -> tuple[dict[str, Tensor], str]:
    """Weights in fp32 under our names for a freshly initialised `model`, and a sentence about them.

    Raises UserError where files are damaged, hold weights that are not known, or numbers that are not finite.
    """
    weights, sentence = start.read(model)
    require_finite(weights, str(start.path), "start from another model")
    return {name: tensor.float() for name, tensor in weights.items()}, sentence


def _export(source: OurExport) -> Start:
    export = source.export

    def read(_: DiT) -> tuple[dict[str, Tensor], str]:
        return source.weights(), f"starting from the weights of {export.path}"

    return Start(export.path, export.run.objective.name, _values(export.run.model), read)


def _upstream(source: UpstreamFolder) -> Start:
    network, mask_index = source.network, source.config.get("mask_index")
    values = {key: getattr(network, key) for key in ("vocab_size", "hidden_size", "layers", "heads", "cond_size")}
    values["mlp_size"] = network.mlp_width
    values["mask_id"] = network.vocab_size - 1 if mask_index is None else mask_index
    source.require_files()

    def read(_: DiT) -> tuple[dict[str, Tensor], str]:
        return source.weights(), f"starting from upstream's weights in {source.path}"

    return Start(source.path, source.objective, _UPSTREAM | {"kv_heads": network.heads} | values, read)


def _lightning(source: LightningFile) -> Start:
    known = {key: value for key, value in _UPSTREAM.items() if key != "kv_heads"}
    which = "averaged weights (EMA)" if source.model.averaged else "weights (no EMA stored)"

    def read(_: DiT) -> tuple[dict[str, Tensor], str]:
        return source.weights(), f"starting from upstream's {which} in {source.path}"

    return Start(source.path, AR if source.causal else "diffusion", known | source.values, read)


def _causal(source: CausalFolder, run: RunConfig) -> Start:
    values = source.values(run.data.length)
    source.require_files()
    assert run.model.vocab_size is not None and run.model.mask_id is not None
    problem = source.vocabulary_problem(run.model.vocab_size, run.model.mask_id)

    def read(model: DiT) -> tuple[dict[str, Tensor], str]:
        return _adapted(source, model, run)

    more = [] if problem is None else [f"train.init_from={run.train.init_from} {problem}"]
    return Start(source.path, AR, values, read, adapts=True, more=more)


def _adapted(source: CausalFolder, model: DiT, run: RunConfig) -> tuple[dict[str, Tensor], str]:
    """A causal model's weights with a row for [MASK] and, for diffusion, the time conditioning of a network that does
    not look at the time yet: gates of 1, all else 0. Under a causal mask it computes what the source did.
    """
    from bd3_ds.model.build import Initializer

    network, mask_id = model.network, run.model.mask_id
    assert mask_id is not None
    weights = source.weights(network.vocab_size, network.vocab_rows, mask_id)
    initial = Initializer(model, run.seed)
    conditioning = {
        name: _fresh(initial, name, parameter) if parameter.is_meta else parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.startswith("time.") or ".modulation." in name
    }
    for name, value in conditioning.items():
        if name.startswith("layers.") and name.endswith("bias"):
            value.view(6, -1)[[2, 5]] = 1.0  # the gates of attention and MLP (`layers.Layer`)
    said = f"starting from the causal model {source.path}; the embedding of [MASK] (id {mask_id}) is the mean of all"
    return weights | conditioning, f"{said} others" + ("" if network.causal else ", its layers now see both ways")


def _fresh(initial: Initializer, name: str, parameter: Tensor) -> Tensor:
    import torch

    value = torch.empty(parameter.shape)
    initial.fill(name, 0, value.view(-1))
    return value


def _values(model: ModelConfig) -> dict[str, Any]:
    return {key: getattr(model, key) for key in _SHAPE} | {"mlp_ratio": model.mlp_ratio}


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """`model.*` values with what null stands for put in, so that equal networks have equal values."""
    full = dict(values)
    if full.get("mlp_size") is None:
        full["mlp_size"] = full["mlp_ratio"] * full["hidden_size"]
    if "kv_heads" in full and full["kv_heads"] is None:
        full["kv_heads"] = full["heads"]
    if full.get("positions") != "learned":
        full["max_positions"] = None
    full["biases"] = sorted(full["biases"])
    return full


def _shown(value: Any) -> str:
    """As one writes it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
