"""Hugging Face's causal models of the GPT-2 and Llama kinds under our names.

A config.json becomes `model.*` values, or a sentence that says what in it we do not have; this needs no torch. Names
and layouts are those of transformers' GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LLAMA_TYPES = ("llama", "mistral", "qwen2")
MODEL_TYPES = ("gpt2", *LLAMA_TYPES)
MOST_PADDING = 1024  # rows that a model may have beyond its tokens
_GPT2_MLP = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}

_GPT2_TOP = {
    "wte.weight": "embed.weight",
    "wpe.weight": "positions.weight",
    "ln_f.weight": "head.norm.weight",
    "ln_f.bias": "head.norm.bias",
    "lm_head.weight": "head.linear.weight",
}
_GPT2_LAYER = {
    "ln_1": "norm_attention",
    "ln_2": "norm_mlp",
    "attn.c_attn": "qkv",
    "attn.c_proj": "out",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
_LLAMA_TOP = {
    "embed_tokens.weight": "embed.weight",
    "norm.weight": "head.norm.weight",
    "lm_head.weight": "head.linear.weight",
}
_LLAMA_LAYER = {
    "input_layernorm": "norm_attention",
    "post_attention_layernorm": "norm_mlp",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


def causal_values(config: Mapping[str, Any], path: Path, length: int) -> dict[str, Any]:
    """What `model.*` must be for the weights beside a config.json (at `path`) to fit; for texts of `length` tokens.

    Raises UserError for what our network does not have.
    """
    try:
        if config.get("model_type") == "gpt2":
            return _gpt2_values(config, path)
        return _llama_values(config, path, length)
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}; is this a causal model's config.json?") from None


def _gpt2_values(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    _refuse(
        path,
        scale_attn_weights=config.get("scale_attn_weights", True) is not True,
        scale_attn_by_inverse_layer_idx=bool(config.get("scale_attn_by_inverse_layer_idx")),
        add_cross_attention=bool(config.get("add_cross_attention")),
        activation_function=config.get("activation_function", "gelu_new") not in _GPT2_MLP,
    )
    return {
        "hidden_size": config["n_embd"],
        "layers": config["n_layer"],
        "heads": config["n_head"],
        "kv_heads": config["n_head"],
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "biases": ["norm", "qkv", "out", "mlp"],
        "mlp": _GPT2_MLP[config.get("activation_function", "gelu_new")],
        "mlp_size": config.get("n_inner") or 4 * config["n_embd"],
        "positions": "learned",
        "max_positions": config.get("n_positions", 1024),
    }


def _llama_values(config: Mapping[str, Any], path: Path, length: int) -> dict[str, Any]:
    kind, heads = config["model_type"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps base and scaling
    scaling = config.get("rope_scaling") or {key: value for key, value in rope.items() if key != "rope_theta"}
    window = config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None
    _refuse(
        path,
        rope_scaling=scaling.get("rope_type", scaling.get("type", "default")) != "default",
        head_dim=(config.get("head_dim") or config["hidden_size"] // heads) * heads != config["hidden_size"],
        hidden_act=config.get("hidden_act", "silu") != "silu",
        sliding_window=window is not None and window < length,
        layer_types=any(one != "full_attention" for one in config.get("layer_types") or []) and window is not None,
    )
    attention = bool(config.get("attention_bias"))
    biases = {"qkv": attention or kind == "qwen2", "out": attention, "mlp": bool(config.get("mlp_bias"))}
    return {
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "biases": [part for part, there in biases.items() if there],
        "mlp": "swiglu",
        "mlp_size": config["intermediate_size"],
        "positions": "rotary",
        "rope_base": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
    }


def _refuse(path: Path, **unlike: bool) -> None:
    for key, is_unlike in unlike.items():
        if is_unlike:
            raise UserError(f"{path} sets {key} to what this program's network does not have; start from another model")


def rename_causal(weights: Mapping[str, Tensor], model_type: str, tied: bool) -> dict[str, Tensor]:
    """A causal model's state dict under our names and in our layouts; raises UserError for a weight it has not."""
    import torch

    ours: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        name = key.removeprefix("transformer.").removeprefix("model.")
        if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")) or (
            tied and name == "lm_head.weight"
        ):
            continue
        top, parts = (_GPT2_TOP, _GPT2_LAYER) if model_type == "gpt2" else (_LLAMA_TOP, _LLAMA_LAYER)
        layer = re.fullmatch(r"(?:h|layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        third = re.fullmatch(r"self_attn\.([qkv])_proj", layer[2]) if layer and model_type != "gpt2" else None
        if name in top:
            ours[top[name]] = tensor
        elif layer and third:
            thirds.setdefault(f"layers.{layer[1]}.qkv.{layer[3]}", {})[third[1]] = tensor
        elif layer and layer[2] in parts:
            turned = tensor.t() if model_type == "gpt2" and tensor.dim() == 2 else tensor  # its matrices are [in, out]
            ours[f"layers.{layer[1]}.{parts[layer[2]]}.{layer[3]}"] = turned
        else:
            raise UserError(f"'{key}' is not a weight that models of model_type={model_type} have")
    for name, found in thirds.items():
        if len(found) == 3:
            ours[name] = torch.cat([found[part] for part in "qkv"])
    return ours


def vocabulary_problem(rows: int, vocab_size: int, mask_id: int, special: Mapping[str, Any]) -> str | None:
    """Why embeddings of `rows` tokens do not serve a tokenizer of `vocab_size` ids, `mask_id` among them; or None.

    `special` are the source's own ids by name (eos_token_id, …). A model without a mask has one row less; further rows
    are padding, as models have up to a multiple of a power of two.
    """
    if rows < vocab_size - 1 or rows - vocab_size >= MOST_PADDING:
        return (
            f"has {rows} tokens, the data's tokenizer {vocab_size - 1} and [MASK]; prepare the data with the "
            "model's own tokenizer"
        )
    if rows == vocab_size - 1 and mask_id != rows:
        return f"has {rows} tokens and none for [MASK], whose id must then be the new one, {rows}, and not {mask_id}"
    for name, ids in special.items():
        if mask_id in (ids if isinstance(ids, list) else [ids]):
            return f"has id {mask_id} as its {name}; [MASK] must be an id of its own"
    return None


def with_mask(weights: Mapping[str, Tensor], vocab_size: int, vocab_rows: int, mask_id: int) -> dict[str, Tensor]:
    """The weights with embedding and output matrix of our vocabulary, where [MASK]'s row is the mean of all others.

    A causal model was never shown what a mask means, so that whatever its row holds is noise, or padding, or the end of
    a text. The mean is no token's. Raises UserError where it is one's after all.
    """
    matrices = {name: weights[name] for name in ("embed.weight", "head.linear.weight") if name in weights}
    return dict(weights) | {name: _grown(m, vocab_size, vocab_rows, mask_id) for name, m in matrices.items()}


def _grown(matrix: Tensor, vocab_size: int, vocab_rows: int, mask_id: int) -> Tensor:
    """Rows [vocab_rows, D] from a source's [R, D]."""
    grown = matrix.new_zeros(vocab_rows, matrix.shape[1])
    known = min(vocab_size, len(matrix))
    grown[:known] = matrix[:known]
    others = [row for row in range(known) if row != mask_id]
    grown[mask_id] = matrix[others].float().mean(0).to(matrix.dtype)
    if bool((matrix[others] == grown[mask_id]).all(1).any()):
        raise UserError("the mean of the source's embeddings is the embedding of a token; its weights are degenerate")
    return grown
