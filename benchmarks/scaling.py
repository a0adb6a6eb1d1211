"""Weak scaling on paper: bytes between ranks by ZeRO stage, their time, and how much of them computing must hide.

    python -m benchmarks.scaling [--mfu 0.4] [--json FILE]

Prints the tables of docs/scaling.md. Nothing is measured here: formulas (`planning/communication.py`, whose bytes
a test counts on two ranks), the bandwidths stated there, H100s at the stated share of their peak, 8 to a node; stage 3
gathers weights again as ds_configs/zero3.json has it. Weak scaling: each rank's tokens a step stay the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bd3_ds.config.ds_json import DEFAULT, load_ds_json
from bd3_ds.model.dit import DiTConfig
from bd3_ds.model.flops import training_flops_per_sequence
from bd3_ds.planning.communication import NETWORK, NVLINK, VARIANTS, seconds, ulysses_traffic, zero_traffic
from bd3_ds.planning.memory import parameter_count, zero_of
from bd3_ds.planning.plan import MFU
from bd3_ds.runtime.gpus import find_gpu

PER_NODE = 8
RANKS = (8, 16, 64, 256, 1024)
GPU = "h100-80g"
REUSE = zero_of(load_ds_json(DEFAULT.parent / "zero3.json")).reuse


@dataclass(frozen=True)
class Model:
    """A BD3-LM and what a rank takes of it at once: sequences of `length` tokens, blocks of `block_size`."""

    network: DiTConfig
    length: int
    block_size: int
    micro_batch: int

    @property
    def parameters(self) -> int:
        """With an output matrix of its own."""
        return parameter_count(self.network)

    @property
    def flops(self) -> float:
        """Of a sequence, forward and backward."""
        return training_flops_per_sequence(self.network, "bd3", self.length, self.block_size)


def _model(hidden: int, layers: int, heads: int, micro_batch: int) -> Model:
    network = DiTConfig(50258, hidden, layers, heads, 4, 128, causal=False, vocab_multiple=64)
    return Model(network, 1024, 16, micro_batch)


MODELS = {
    "small": _model(768, 12, 12, 16),
    "1.3B": _model(2048, 20, 16, 8),
    "7B": _model(4096, 32, 32, 4),
}


@dataclass(frozen=True)
class Row:
    """A step of one model under one variant on so many ranks; seconds of communication and of computing."""

    model: str
    variant: str
    ranks: int
    sent: float
    communication: float
    computing: float

    @property
    def needed(self) -> float:
        """Communication over computing: the share of computing that must run beside it; above 1 it cannot be hidden."""
        return self.communication / self.computing


def row(name: str, variant: str, ranks: int, mfu: float, accumulation: int = 1) -> Row:
    """One cell of the tables."""
    model = MODELS[name]
    traffic = zero_traffic(model.parameters, variant, ranks, PER_NODE, accumulation, distance=REUSE)
    computing = accumulation * model.micro_batch * model.flops / (find_gpu(GPU, "GPU").peak_bf16 * mfu)
    return Row(name, variant, ranks, sum(c.sent for c in traffic), seconds(traffic), computing)


def least_tokens(name: str, variant: str, ranks: int, mfu: float) -> float:
    """Clean tokens of a rank's micro-batch at which communication and computing take as long, without accumulation."""
    model = MODELS[name]
    per_token = model.flops / model.length / (find_gpu(GPU, "GPU").peak_bf16 * mfu)
    return seconds(zero_traffic(model.parameters, variant, ranks, PER_NODE, distance=REUSE)) / per_token


def ulysses_row(name: str, ranks: int, mfu: float) -> tuple[float, float]:
    """GB that a rank sends in a step, and needed overlap, where `ranks` of a node share each sequence."""
    model = MODELS[name]
    tokens, queries = (model.micro_batch * model.length * streams for streams in (2, 1))
    traffic = ulysses_traffic(model.network.hidden_size, model.network.layers, tokens, queries, ranks)
    computing = model.micro_batch * model.flops / ranks / (find_gpu(GPU, "GPU").peak_bf16 * mfu)
    return sum(c.sent for c in traffic) / 1e9, seconds(traffic) / computing


def tables(mfu: float) -> str:
    """All tables in Markdown."""
    parts = []
    for name, model in MODELS.items():
        one = row(name, "1", 8, mfu)
        parts.append(
            f"### {name}: {model.parameters / 1e6:,.0f} M parameters, {model.micro_batch} sequences of "
            f"{model.length:,} tokens a rank, {one.computing:.3f} s of computing\n\n"
            + _table(
                ["ZeRO", "GB sent", *(f"{ranks:,}" for ranks in RANKS), "least tokens", "4 micro-batches"],
                [
                    [
                        variant,
                        f"{row(name, variant, RANKS[-1], mfu).sent / 1e9:.2f}",
                        *(_percent(row(name, variant, ranks, mfu).needed) for ranks in RANKS),
                        f"{least_tokens(name, variant, RANKS[-1], mfu):,.0f}",
                        _percent(row(name, variant, RANKS[-1], mfu, accumulation=4).needed),
                    ]
                    for variant in VARIANTS
                ],
            )
        )
    shared = [
        [
            name,
            *(f"{sent:.2f} GB, {_percent(needed)}" for sent, needed in (ulysses_row(name, n, mfu) for n in (2, 4, 8))),
        ]
        for name in MODELS
    ]
    parts.append("### Ranks that share a sequence (Ulysses)\n\n" + _table(["model", "2", "4", "8"], shared))
    return "\n\n".join(parts)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mfu", type=float, default=MFU)
    options.add_argument("--json", type=Path, metavar="FILE")
    asked = options.parse_args(argv)
    print(tables(asked.mfu))
    if asked.json is not None:
        rows = [row(name, variant, n, asked.mfu) for name in MODELS for variant in VARIANTS for n in RANKS]
        found = {"mfu": asked.mfu, "gpu": GPU, "network": NETWORK, "nvlink": NVLINK, "rows": [asdict(r) for r in rows]}
        asked.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
