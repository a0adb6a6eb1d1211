"""What one micro-batch holds on a rank, in bytes: kept from the forward to the backward pass, and in passing.

The layers are asked themselves (`trace.py`): they run on tensors that have no memory. The head is counted by hand: its
loss goes chunk by chunk, and which tensors a chunk has is decided only in `diffusion/chunked_head.py`.
`tests/unit/planning/test_plan.py` holds both against autograd's own list.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig
from bd3_ds.diffusion.chunked_head import CACHED_BYTES, CHUNK_BYTES
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.model.attention.attention import backend_for
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.planning.trace import TRACED, Traced, Work, trace_layers

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Pass:
    """One micro-batch of a rank.

    rows: texts; noisy and clean: packed tokens of a text on this rank; scored: tokens with a loss, of all rows.
    residual and compute: bytes of a number between layers and inside them. per_row: each row has its own conditioning.
    attention: the backend that runs, never "auto".
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
        """Of a text in the last layer: its clean tokens give only keys and values."""
        return self.noisy or self.clean


def pass_of(run: RunConfig, network: DiTConfig, block_size: int, stage: int, cuda: bool) -> Pass:
    """What a rank of `run` puts through the network at once; ranks that share a sequence have a part of it each."""
    name, length, ranks = run.objective.name, run.data.length, run.train.sequence_parallel
    views = run.objective.views
    single = OBJECTIVES[name].causal or block_size == length
    masked = 1.0 if OBJECTIVES[name].causal else make_proposal(run.objective.schedule).mean_rate
    bf16 = run.train.precision == "bf16"
    attention = backend_for(network.attention, cuda, lambda: not single or run.data.document_mask)
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


def layers_bytes(given: Pass, recompute: str) -> int:
    """Kept by all layers, and by autocast of their weights; with "full" each layer's input, with "selective" all but
    what is inside the MLPs.
    """
    few = _few_rows(given, recompute)
    return _at_rows([one.kept + max(0, given.network.layers - TRACED) * one.each_layer for one in few], given.rows)


def working_bytes(given: Pass, recompute: str) -> int:
    """The most that the layers' backward pass holds beyond `layers_bytes`: gradients, and what is computed again."""
    return _at_rows([one.working for one in _few_rows(given, recompute)], given.rows)


def _few_rows(given: Pass, recompute: str) -> list[Traced]:
    """Traces of one row, or of two and of three where there are more."""
    work = Work(
        dataclasses.replace(given.network, layers=min(given.network.layers, TRACED), vocab_size=2, vocab_multiple=1),
        given.noisy,
        given.clean,
        "fp32" if given.compute == 4 else "mixed" if given.residual == 4 else "bf16",
        given.attention,
        given.cuda,
        recompute,
    )
    return [trace_layers(work, rows, given.per_row) for rows in ([1] if given.rows == 1 else [2, 3])]


def _at_rows(values: list[int], rows: int) -> int:
    """All counts are affine in the rows of a micro-batch from two on."""
    return values[0] if len(values) == 1 else values[0] + (rows - 2) * (values[1] - values[0])


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
