"""Model FLOPs of a training step, counted from shapes, without the pairs that the mask hides."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.model.dit_config import DiTConfig


@dataclass(frozen=True)
class ForwardFlops:
    """Of one sequence's forward pass: the layers' attention (with its four matrices), their MLPs, the head."""

    attention: float
    mlp: float
    head: float


def forward_flops_per_sequence(
    network: DiTConfig,
    objective: str,
    length: int,
    block_size: int,
    masked_share: float = 0.5,
    views: int = 1,
    head_tokens: float | None = None,
) -> ForwardFlops:
    """Forward pass of one sequence of `length` clean tokens; `views` noisy views share them.

    A product of [m, k] and [k, n] costs 2 m k n. The head runs where a loss is due: everywhere for AR, at the masked
    tokens for masked diffusion (half of them under the log-linear schedule), or at `head_tokens` positions of the
    sequence and its views, where that is known. Pairs that only data.document_mask
    hides depend on the text and are counted, and so are padding and the rows that model.vocab_multiple adds.
    """
    width, layers = network.hidden_size, network.layers
    to_keys = 2 * width * network.key_heads * network.head_width  # weights that make keys and values
    # Of a token, without scores.
    attention = 2 * (2 * width**2 + to_keys)
    mlp = 2 * (3 if network.mlp == "swiglu" else 2) * width * network.mlp_width
    if OBJECTIVES[objective].causal:
        noisy, clean, scored = length, 0, length - 1.0
        noisy_pairs, clean_pairs = length * (length + 1) // 2, 0
    else:
        blocks = length // block_size
        noisy, clean = views * length, length if blocks > 1 else 0
        earlier = block_size**2 * blocks * (blocks - 1) // 2  # clean tokens of earlier blocks, over all queries
        one_stream = earlier + block_size**2 * blocks
        noisy_pairs, clean_pairs = views * one_stream, one_stream if clean else 0
        scored = views * (length - 1) * masked_share
    scored = scored if head_tokens is None else head_tokens
    pair = 4 * width
    # The last layer's clean tokens give keys and values, nothing more.
    full = (noisy + clean) * attention + (noisy_pairs + clean_pairs) * pair
    last = noisy * attention + clean * 2 * to_keys + noisy_pairs * pair
    return ForwardFlops(
        attention=float((layers - 1) * full + last),
        mlp=float(mlp * ((layers - 1) * (noisy + clean) + noisy)),
        head=scored * 2 * width * network.vocab_rows,
    )


def training_flops_per_sequence(
    network: DiTConfig,
    objective: str,
    length: int,
    block_size: int,
    masked_share: float = 0.5,
    views: int = 1,
    head_tokens: float | None = None,
) -> float:
    """Forward and backward (3 x forward) on one sequence of `length` clean tokens; recomputation is not counted."""
    forward = forward_flops_per_sequence(network, objective, length, block_size, masked_share, views, head_tokens)
    return 3.0 * (forward.attention + forward.mlp + forward.head)


def recomputed_flops_per_sequence(
    network: DiTConfig, objective: str, length: int, block_size: int, views: int, recompute: str
) -> float:
    """What train.activation_checkpointing computes a second time: nothing, the MLPs, or all of the layers."""
    forward = forward_flops_per_sequence(network, objective, length, block_size, 0.0, views)
    return {"none": 0.0, "selective": forward.mlp, "full": forward.attention + forward.mlp}[recompute]
