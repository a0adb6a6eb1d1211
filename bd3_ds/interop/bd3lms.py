"""Weights and config.json of upstream bd3lms, and of its forerunner MDLM, under our names and back under theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.runtime.errors import UserError

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
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}
_THEIRS = {  # of our network's choices, those of upstream's
    "tie_embeddings": False,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "biases": ("mlp", "head"),
    "mlp": "gelu",
    "positions": "rotary",
    "rope_base": 10_000.0,
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


def values_of_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """What the shapes of upstream's weights, under our names, tell of `model.*`; cond_size is None for AR.

    They do not tell the heads. Raises UserError for weights (of `path`) that are not all there.
    """
    try:
        vocab_size, hidden_size = shapes["embed.weight"]
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "layers": len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
            "mlp_size": shapes["layers.0.up.weight"][0],
            "cond_size": shapes.get("time.expand.weight", (None,))[0],
        }
    except (KeyError, ValueError):
        raise UserError(f"{path} lacks weights that upstream's models have; is it whole?") from None


def upstream_objective(config: Mapping[str, Any]) -> str:
    """Which objective a config.json stands for; `model_type` mdlm is a release of MDLM, before bd3lms."""
    if config.get("model_type") == "mdlm":
        if config.get("time_conditioning"):
            raise UserError("a release of MDLM with time_conditioning=true is not known here: our MDLM has no time")
        return MDLM
    if config.get("causal"):
        return AR
    if config.get("cross_attn"):
        return BD3
    return SEDD if config.get("time_conditioning") else MDLM


def upstream_network(config: Mapping[str, Any], path: Path) -> DiTConfig:
    """The network of an upstream config.json; raises UserError naming keys that are missing."""
    needed = ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "cond_dim")
    missing = [key for key in needed if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; is this a bd3lms config.json?")
    return DiTConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_dim"],
        layers=config["n_blocks"],
        heads=config["n_heads"],
        mlp_ratio=config.get("mlp_ratio", 4),
        cond_size=config["cond_dim"],
        causal=bool(config.get("causal")),
        dropout=config.get("dropout", 0.0),
    )


def their_name(name: str) -> str:
    """Upstream's key for one of our parameters, with `backbone.` before it; KeyError for one that it does not have."""
    stem, _, leaf = name.rpartition(".")
    if name in _TOP_BACK:
        return f"backbone.{_TOP_BACK[name]}"
    if stem in _TOP_BACK:
        return f"backbone.{_TOP_BACK[stem]}.{leaf}"
    _, number, part = stem.split(".")
    return f"backbone.blocks.{number}.{_LAYER_BACK[part]}.{leaf}"


def upstream_config(network: DiTConfig, objective: str, block_size: int, length: int, mask_id: int) -> dict[str, Any]:
    """The config.json of upstream for a network of ours; raises UserError for what upstream's network does not have."""
    for key, value in _THEIRS.items():
        ours = getattr(network, key)
        if ours != value:
            raise UserError(
                f"model.{key}={list(ours) if isinstance(ours, tuple) else ours} is not in upstream's network, which "
                f"has {list(value) if isinstance(value, tuple) else value}; convert it --to hf"
            )
    if network.key_heads != network.heads or network.vocab_rows != network.vocab_size:
        raise UserError(
            "upstream's network has as many heads of keys as of queries, and no rows beyond its vocabulary; convert it "
            "--to hf"
        )
    if network.mlp_width != 4 * network.hidden_size:
        raise UserError(
            f"an MLP of width {network.mlp_width} is not upstream's, 4 x {network.hidden_size}; convert it --to hf"
        )
    return {
        "model_type": "bd3lm",
        "architectures": ["BD3LM"],
        "block_size": length if OBJECTIVES[objective].causal else block_size,
        "vocab_size": network.vocab_size,
        "mask_index": mask_id,
        "model_length": length,
        "causal": network.causal,
        "cross_attn": OBJECTIVES[objective].has_blocks,
        "adaln": not network.causal,
        "time_conditioning": OBJECTIVES[objective].timed,
        "var_min": OBJECTIVES[objective].has_blocks,
        "attn_backend": "sdpa",
        "hidden_dim": network.hidden_size,
        "cond_dim": network.cond_size,
        "n_blocks": network.layers,
        "n_heads": network.heads,
        "dropout": network.dropout,
        "sampling_eps_min": 1e-3,
        "sampling_eps_max": 0.999,
    }
