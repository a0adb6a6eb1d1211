"""What one micro-batch keeps from the forward to the backward pass, in bytes, counted tensor by tensor.

It follows what the layers do (`model/layers.py`, `rope.py`, `dropout.py`, `stripe_attention.py`,
`diffusion/chunked_head.py`): a product keeps its input, a norm its input, GELU its input, a gated residual what is
gated; rotations and additions keep nothing. Vectors of one number a channel are left out.
`tests/unit/planning/test_plan.py` holds it against autograd's own list.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig
from bd3_ds.diffusion.chunked_head import CACHED_BYTES, CHUNK_BYTES
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.model.dit_config import DiTConfig

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Pass:
    """One micro-batch of a rank.

    rows: texts; noisy and clean: packed tokens of a text on this rank; scored: tokens with a loss, of all rows.
    residual and compute: bytes of a number between layers and inside them. per_row: each row has its own conditioning.
    """

    network: DiTConfig
    rows: int
    noisy: int
    clean: int
    scored: int
    residual: int
    compute: int
    attention: str
    per_row: bool
    cuda: bool

    @property
    def tokens(self) -> int:
        """Of a text in all layers but the last."""
        return self.noisy + self.clean

    @property
    def queries(self) -> int:
        """Of a text in the last layer: its clean tokens give keys and values alone."""
        return self.noisy or self.clean


def pass_of(run: RunConfig, network: DiTConfig, block_size: int, stage: int, cuda: bool) -> Pass:
    """What a rank of `run` puts through the network at once; ranks that share a sequence have a part of it each."""
    name, length, ranks = run.objective.name, run.data.length, run.train.sequence_parallel
    views = run.objective.views
    single = OBJECTIVES[name].causal or block_size == length
    masked = 1.0 if OBJECTIVES[name].causal else make_proposal(run.objective.schedule).mean_rate
    bf16 = run.train.precision == "bf16"
    attention = network.attention
    if attention == "auto" or (attention == "stripes" and cuda):
        attention = "sdpa" if single and not run.data.document_mask else "flex" if cuda else "stripes"
    return Pass(
        network=network,
        rows=run.train.micro_batch,
        noisy=views * length // ranks,
        clean=0 if single else length // ranks,
        scored=round(run.train.micro_batch * views * (length - 1) * masked / ranks),
        residual=2 if bf16 and stage > 0 else 4,
        compute=2 if bf16 else 4,
        attention=attention,
        per_row=OBJECTIVES[name].timed and run.train.micro_batch > 1,
        cuda=cuda,
    )


def attention_bytes(given: Pass, queries: int) -> int:
    """Kept by a layer's attention and the residual around it, its input included."""
    width, heads, r, c = given.network.hidden_size, given.network.heads, given.residual, given.compute
    tokens = given.tokens
    each_token = width * (r + c) + 2 * r  # input of the norm and its two statistics, input of qkv
    each_query = width * c  # input of `out`
    if given.attention == "stripes":
        each_token += 2 * width * c  # keys, values
        each_query += width * c
    elif given.attention == "dense":
        each_token += 2 * width * 4
        each_query += 4 * width + 4 * heads * tokens
    else:  # values are a view of qkv, all of which stays; output and log-sum-exp
        each_token += 4 * width * c
        each_query += 2 * width * c + 4 * heads
    each_token += width * r if given.per_row else 0  # normed, before it is scaled
    return given.rows * (tokens * each_token + queries * (each_query + _gated(given))) + _angles(given, queries)


def mlp_bytes(given: Pass, queries: int, recompute: bool = False) -> int:
    """Kept by a layer's MLP and the residual around it, its input included; with `recompute`, not what is inside."""
    width, r, c = given.network.hidden_size, given.residual, given.compute
    each = width * (r + c) + 2 * r  # input of the norm and its two statistics, input of `up`
    each += width * r if given.per_row else 0
    # Before and after GELU; or the gate before and after SiLU, what it gates, and their product.
    inside = (4 if given.network.mlp == "swiglu" else 2) * given.network.mlp_width * c
    each += 0 if recompute else inside
    return given.rows * queries * (each + _gated(given))


def layers_bytes(given: Pass, recompute: str) -> int:
    """Kept by all layers; with "full" each layer's input, with "selective" all but what is inside the MLPs."""
    count, width = given.network.layers, given.network.hidden_size
    # The embedding's tokens, int64, and the angles that all layers share.
    shared = 8 * given.rows * given.tokens + _angles(given, given.tokens)
    if recompute == "full":
        return shared + count * given.rows * given.tokens * width * given.residual
    inside = recompute == "selective"
    queries = [given.tokens] * (count - 1) + [given.queries]
    return shared + sum(attention_bytes(given, q) + mlp_bytes(given, q, inside) for q in queries)


def recomputed_bytes(given: Pass, recompute: str) -> int:
    """What one layer's recomputation holds while its backward pass runs."""
    tokens = given.tokens if given.network.layers > 1 else given.queries
    inside = mlp_bytes(given, tokens) - mlp_bytes(given, tokens, recompute=True)
    whole = attention_bytes(given, tokens) + mlp_bytes(given, tokens)
    kept = given.rows * given.tokens * given.network.hidden_size * given.residual
    return {"none": 0, "selective": inside, "full": whole - kept}[recompute]


def backward_bytes(given: Pass) -> int:
    """Gradients inside one layer while its backward pass runs: the larger of MLP's and attention's."""
    width, c = given.network.hidden_size, given.compute
    mlp = (2 * given.network.mlp_ratio + 2) * width * c
    # Of output, q, k, v and of qkv; stripes add keys' and values' up in fp32.
    attention = 7 * width * c + (8 * width if given.attention == "stripes" else 0)
    return given.rows * given.tokens * (max(mlp, attention) + width * given.residual)


def cast_weights_bytes(given: Pass, parameters: int) -> int:
    """Autocast keeps each product's weights in bf16 until the backward pass; the head's are cast for themselves."""
    network = given.network
    matrices = 1 if network.tie_embeddings else 2
    in_products = parameters - matrices * network.vocab_rows * network.hidden_size
    return given.compute * in_products if given.compute < given.residual else 0


def head_bytes(given: Pass) -> int:
    """Kept by the head: its input at the scored tokens, and the gradients that are ready with the loss."""
    width = given.network.hidden_size
    each = width * given.residual * (4 if given.per_row else 2) + 16
    return given.scored * each + given.network.vocab_rows * (width + 1) * given.residual


def logits_bytes(given: Pass) -> int:
    """Held on top of `head_bytes` while the head's loss is made: one chunk of logits, and gradients being added up."""
    width, rows, c = given.network.hidden_size, given.network.vocab_rows, given.compute
    in_chunk = min(given.scored, max(1, CHUNK_BYTES // (rows * c)))
    chunk = in_chunk * rows * c
    # Logits and slopes of a part of it in fp32, and what softmax makes of them.
    part = 3 * min(in_chunk * rows * 4, 2 * CHUNK_BYTES if given.cuda else CACHED_BYTES)
    several = in_chunk < given.scored and c < 4
    adding = rows * width * ((4 + c if several else c) - given.residual)
    cast = rows * width * c if c < given.residual else 0
    return chunk + part + max(0, adding) + cast + given.scored * width * given.residual + 2 * in_chunk * width * c


def _gated(given: Pass) -> int:
    """Bytes a query of dropout's mask and of the branch that a gate scales."""
    width = given.network.hidden_size
    mask = 0 if given.network.dropout == 0 else width if given.cuda else width * given.compute
    return mask + (0 if given.network.causal else width * given.compute)


def _angles(given: Pass, tokens: int) -> int:
    """cos and sin in fp32; a layer also keeps those of its queries, scaled."""
    return 4 * tokens * given.network.hidden_size // given.network.heads
