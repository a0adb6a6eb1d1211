"""Floating-point operations that a training step asks for, counted from shapes, without what the mask hides."""

from __future__ import annotations

from bd3_ds.config.schema import AR
from bd3_ds.model.network import Network


def training_flops_per_sequence(
    network: Network, objective: str, length: int, block_size: int, masked_share: float = 0.5, views: int = 1
) -> float:
    """Forward and backward (3 x forward) on one sequence of `length` clean tokens; recomputation is not counted.

    `views` noisy views share the clean tokens.

    A product of [m, k] and [k, n] costs 2 m k n. The head runs where a loss is due: everywhere for AR, at the masked
    tokens for masked diffusion (half of them under the log-linear schedule). Pairs that only data.document_mask
    hides depend on the text and are counted, and so are padding and the rows that model.vocab_multiple adds.
    """
    width = network.hidden_size
    to_keys = 2 * width * network.key_heads * network.head_width  # weights that make keys and values
    attention_weights = 2 * width**2 + to_keys
    mlp_weights = (3 if network.mlp == "swiglu" else 2) * width * network.mlp_width
    per_token = 2 * (attention_weights + mlp_weights)
    if objective == AR:
        tokens, pairs = length, length * (length + 1) // 2
        body = network.layers * (tokens * per_token + 4 * width * pairs)
        scored = length - 1.0
    else:
        blocks = length // block_size
        clean = length if blocks > 1 else 0
        earlier = block_size**2 * blocks * (blocks - 1) // 2  # clean tokens of earlier blocks, over all queries
        own = block_size**2 * blocks
        pairs = (earlier + own) * (views + (1 if clean else 0))
        one_layer = (views * length + clean) * per_token + 4 * width * pairs
        # The last layer's clean tokens give keys and values, nothing more.
        spared = clean * (per_token - 2 * to_keys) + (4 * width * (earlier + own) if clean else 0)
        body = network.layers * one_layer - spared
        scored = views * (length - 1) * masked_share
    return 3.0 * (body + scored * 2 * width * network.vocab_rows)
