"""Whose weights a run starts from: the one place that knows all kinds of train.init_from.

An export (or run) of ours, upstream bd3lms as a folder or a Lightning file, or a causal model of the GPT-2 or Llama
kinds, which starts AR runs as it is and diffusion runs by adaptation. Finding a start and comparing it with the run
imports no torch; reading its weights does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.checkpoint.export import Export, find_export, load_weights
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AR, ModelConfig, RunConfig
from bd3_ds.interop.bd3lms import our_name, rename_upstream, upstream_network, upstream_objective, values_of_shapes
from bd3_ds.interop.hf_causal import MODEL_TYPES, causal_values, rename_causal, vocabulary_problem, with_mask
from bd3_ds.interop.lightning import read_lightning
from bd3_ds.interop.safetensors import read_tensors, tensor_files
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.model.build import Initial
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

    `adapts`: a causal model that may start a diffusion run. `more` are problems that no single key mends. `read` gives
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
            return [f"{name} wants {words}; this run has {have}", *self.more]
        return self.more + [
            f"{name} holds a model with model.{key}={_shown(theirs[key])}, this run has {_shown(ours[key])}; "
            "make the two equal or start from another export"
            for key in unlike
            if _FOLLOWS.get(key) not in unlike
        ]


def find_start(run: RunConfig) -> Start:
    """The source that train.init_from names; raises UserError where it is none, or one that we cannot use."""
    place = run.train.init_from
    assert place is not None
    path = Path(place)
    if path.is_file():
        return _lightning(path)
    config = path / "config.json"
    if not config.is_file() or (path / "export.json").is_file():
        return _export(find_export(place))
    content = read_json(config, "config.json")
    if not isinstance(content, dict):
        raise UserError(f"{config} must hold one JSON object")
    if content.get("model_type") in MODEL_TYPES:
        return _causal(path, content, run)
    if content.get("model_type") == "bd3-ds":
        raise UserError(f"{config} is in Hugging Face's form; make an export of it first: run.py convert --from hf")
    if "n_blocks" not in content and "model_type" in content:
        raise UserError(
            f"{config} has model_type={content['model_type']}; known are bd3lms' own and {', '.join(MODEL_TYPES)}"
        )
    return _upstream(path, content)


def starting_weights(start: Start, model: DiT) -> tuple[dict[str, Tensor], str]:
    """Weights in fp32 under our names for a freshly initialised `model`, and a sentence about them.

    Raises UserError where files are damaged, hold weights that are not known, or numbers that are not finite.
    """
    import torch

    weights, sentence = start.read(model)
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{start.path} holds weights that are not finite ({name}); start from another model")
    return {name: tensor.float() for name, tensor in weights.items()}, sentence


def _export(export: Export) -> Start:
    def read(_: DiT) -> tuple[dict[str, Tensor], str]:
        return load_weights(export), f"starting from the weights of {export.path}"

    return Start(export.path, export.run.objective.name, _values(export.run.model), read)


def _upstream(path: Path, config: dict[str, Any]) -> Start:
    objective = upstream_objective(config)
    # A causal network has no conditioning, so that its width need not be told.
    known = {"cond_dim": 128} | config if OBJECTIVES[objective].causal else config
    network = upstream_network(known, path / "config.json")
    values = {key: getattr(network, key) for key in ("vocab_size", "hidden_size", "layers", "heads", "cond_size")}
    values["mlp_size"] = network.mlp_width
    values["mask_id"] = network.vocab_size - 1 if config.get("mask_index") is None else config["mask_index"]
    tensor_files(path)

    def read(_: DiT) -> tuple[dict[str, Tensor], str]:
        return rename_upstream(read_tensors(path)), f"starting from upstream's weights in {path}"

    return Start(path, objective, _UPSTREAM | {"kv_heads": network.heads} | values, read)


def _lightning(path: Path) -> Start:
    """A Lightning file of upstream. Its configuration is code and is not read: shapes tell all but the heads."""
    model = read_lightning(path, our_name)
    values = values_of_shapes(model.shapes, path)
    known = {key: value for key, value in _UPSTREAM.items() if key != "kv_heads"}
    which = "averaged weights (EMA)" if model.averaged else "weights, there being no average,"

    def read(_: DiT) -> tuple[dict[str, Tensor], str]:
        return model.read(), f"starting from upstream's {which} in {path}"

    return Start(path, AR if values["cond_size"] is None else "diffusion", known | values, read)


def _causal(path: Path, config: dict[str, Any], run: RunConfig) -> Start:
    values = causal_values(config, path / "config.json", run.data.length)
    tensor_files(path)
    assert run.model.vocab_size is not None and run.model.mask_id is not None
    special: dict[str, Any] = {
        key: config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if key in config
    }
    problem = vocabulary_problem(config["vocab_size"], run.model.vocab_size, run.model.mask_id, special)

    def read(model: DiT) -> tuple[dict[str, Tensor], str]:
        weights = rename_causal(read_tensors(path), config["model_type"], values["tie_embeddings"])
        return _adapted(weights, model, run, path)

    more = [] if problem is None else [f"train.init_from={run.train.init_from} {problem}"]
    return Start(path, AR, values, read, adapts=True, more=more)


def _adapted(weights: dict[str, Tensor], model: DiT, run: RunConfig, path: Path) -> tuple[dict[str, Tensor], str]:
    """A causal model's weights with a row for [MASK] and, for diffusion, the time conditioning of a network that does
    not look at the time yet: gates of 1, all else 0. Under a causal mask it computes what the source did.
    """
    from bd3_ds.model.build import Initial

    network, mask_id = model.network, run.model.mask_id
    assert mask_id is not None
    weights = with_mask(weights, network.vocab_size, network.vocab_rows, mask_id)
    initial = Initial(model, run.seed)
    conditioning = {
        name: _fresh(initial, name, parameter) if parameter.is_meta else parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.startswith("time.") or ".modulation." in name
    }
    for name, value in conditioning.items():
        if name.startswith("layers.") and name.endswith("bias"):
            value.view(6, -1)[[2, 5]] = 1.0  # the gates of attention and MLP (`layers.Layer`)
    said = f"starting from the causal model {path}; the embedding of [MASK] (id {mask_id}) is the mean of all others"
    return weights | conditioning, said + ("" if network.causal else ", its layers now see both ways")


def _fresh(initial: Initial, name: str, parameter: Tensor) -> Tensor:
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
