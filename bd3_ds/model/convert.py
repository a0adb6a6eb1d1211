"""Weights of upstream bd3lms (config.json and model.safetensors) under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.model.network import Network
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

T = TypeVar("T")

_TOP = {
    "vocab_embed.embedding": "embed.weight",
    "sigma_map.mlp.0": "time.expand",
    "sigma_map.mlp.2": "time.mix",
    "output_layer.norm_final": "head.norm",
    "output_layer.linear": "head.linear",
    "output_layer.adaLN_modulation": "head.modulation",
}
_LAYER = {
    "norm1": "norm_attention",
    "norm2": "norm_mlp",
    "attn_qkv": "qkv",
    "attn_out": "out",
    "mlp.0": "up",
    "mlp.2": "down",
    "adaLN_modulation": "modulation",
}
_BUFFERS = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max", "block_diff_mask")


def our_name(key: str) -> str | None:
    """Our parameter name for an upstream key (with or without `backbone.`), or None for a buffer not kept."""
    key = key.removeprefix("_orig_mod.").removeprefix("backbone.").removeprefix("_orig_mod.")
    if key in _BUFFERS:
        return None
    if key in _TOP:
        return _TOP[key]
    stem, _, leaf = key.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if layer and layer[2] in _LAYER:
        return f"layers.{layer[1]}.{_LAYER[layer[2]]}.{leaf}"
    raise UserError(f"'{key}' is not a weight that upstream's models have; is this a bd3lms checkpoint?")


def rename_upstream(weights: Mapping[str, T]) -> dict[str, T]:
    """Upstream's state dict under our names; shapes and row orders are the same."""
    return {name: value for key, value in weights.items() if (name := our_name(key)) is not None}


def upstream_objective(config: Mapping[str, Any]) -> str:
    """Which objective a config.json stands for."""
    if config.get("causal"):
        return AR
    if config.get("cross_attn"):
        return BD3
    return SEDD if config.get("time_conditioning") else MDLM


def upstream_network(config: Mapping[str, Any], path: Path) -> Network:
    """The network of an upstream config.json; raises UserError naming keys that are missing."""
    needed = ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "cond_dim")
    missing = [key for key in needed if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is this a bd3lms config.json?")
    return Network(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_dim"],
        layers=config["n_blocks"],
        heads=config["n_heads"],
        mlp_ratio=config.get("mlp_ratio", 4),
        cond_size=config["cond_dim"],
        causal=bool(config.get("causal")),
        dropout=config.get("dropout", 0.0),
    )


def read_upstream(directory: Path) -> tuple[dict[str, Any], Path]:
    """Upstream's config.json and the path of its model.safetensors; raises UserError where one is not there."""
    config = read_json(directory / "config.json", "upstream config.json")
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights} not found; export the weights as safetensors first (pickles are not read)")
    return config, weights
