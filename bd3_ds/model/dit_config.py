"""DiTConfig: the architecture of a network in numbers and names; no torch here, so that checks are quick."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import ModelConfig
from bd3_ds.runtime.errors import UserError


@dataclass(frozen=True)
class DiTConfig:
    """The architecture: everything that decides the network's parameters and their use; `causal` is AR: no
    conditioning, block size 1.

    Embedding and output matrix have `vocab_rows` rows, vocab_size rounded up to a multiple of vocab_multiple: GPUs
    multiply such sizes faster. The rows beyond the vocabulary belong to no token and never get a probability. The last
    fields are variants beyond the paper's network, for GPT-2 and Llama.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    mlp_ratio: int
    cond_size: int
    causal: bool
    dropout: float = 0.0
    rope_base: float = 10_000.0
    attention: str = "auto"
    vocab_multiple: int = 1
    tie_embeddings: bool = False
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    biases: tuple[str, ...] = ("mlp", "head")
    mlp: str = "gelu"
    mlp_size: int | None = None
    kv_heads: int | None = None
    positions: str = "rotary"
    max_positions: int | None = None

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and of the output matrix."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_width(self) -> int:
        """d, the width of a head."""
        return self.hidden_size // self.heads

    @property
    def mlp_width(self) -> int:
        """The width inside the MLP."""
        return self.mlp_size or self.mlp_ratio * self.hidden_size

    @property
    def key_heads(self) -> int:
        """Heads of keys and of values, each shared by heads / key_heads heads of queries."""
        return self.kv_heads or self.heads


def dit_config(model: ModelConfig, objective: str) -> DiTConfig:
    """The DiTConfig of a complete model section (vocabulary known) and an objective."""
    if model.vocab_size is None:
        raise UserError("model.vocab_size is not set; it comes from the data's tokenizer or from the export")
    return DiTConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=model.layers,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        cond_size=model.cond_size,
        causal=OBJECTIVES[objective].causal,
        dropout=model.dropout,
        rope_base=model.rope_base,
        attention=model.attention,
        vocab_multiple=model.vocab_multiple,
        tie_embeddings=model.tie_embeddings,
        norm=model.norm,
        norm_eps=model.norm_eps,
        biases=tuple(model.biases),
        mlp=model.mlp,
        mlp_size=model.mlp_size,
        kv_heads=model.kv_heads,
        positions=model.positions,
        max_positions=model.max_positions,
    )
