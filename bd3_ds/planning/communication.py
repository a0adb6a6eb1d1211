"""Bytes that one rank moves in an optimizer step, and how long they take: arithmetic for a cluster before it is rented.

`Collective.tensor` is what is handed to the collective: the whole tensor, of all ranks, its larger side.
`Collective.sent` is what a rank sends at least, as ring algorithms do: (n - 1) / n of the tensor for a reduce-scatter,
all-gather or all-to-all, twice that for an all-reduce. tests/distributed/test_communication.py counts the tensors of
real steps. What is left out is small: norms, losses and records, some kilobytes a step.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL = "all_reduce", "reduce_scatter", "all_gather", "all_to_all"

# Assumptions, in bytes a second and direction: of a GPU to those in its node, and to those in others.
NVLINK = 450e9  # fourth generation, as its maker states it; other GPUs' links stand in gpus.py
NETWORK = 50e9  # 400 Gb/s for each GPU

# Stage 3 frees a weight after use where the trace does not come back to it within so many numbers.
REUSE_DISTANCE = 1_000_000_000
# Quantised weights and gradients come in groups of so many numbers with one fp32 scale (ZeRO++).
QUANTISED_GROUP = 2048

VARIANTS = ("0", "1", "2", "3", "3 qwZ", "3 hpZ", "3 qgZ", "3 ZeRO++")  # others join marks: "3 qwZ hpZ"


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in an optimizer step: the bytes of all tensors, among `ranks` ranks, in a node or between."""

    kind: str
    tensor: float
    ranks: int
    in_node: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return self.tensor * (self.ranks - 1) / self.ranks * (2 if self.kind == ALL_REDUCE else 1)

    @property
    def seconds(self) -> float:
        """At the bandwidths above; what latency adds is left out."""
        return self.seconds_by(NVLINK)

    def seconds_by(self, link: float) -> float:
        """With another bandwidth inside a node, behind which the network's can only fall."""
        return self.sent / (link if self.in_node else min(link, NETWORK))


def zero_traffic(
    parameters: float,
    variant: str,
    ranks: int,
    per_node: int,
    accumulation: int = 1,
    width: int = 2,
    distance: float = REUSE_DISTANCE,
) -> list[Collective]:
    """What ZeRO moves in an optimizer step; `variant` is one of VARIANTS, `width` the bytes of a weight in its passes.

    As DeepSpeed 0.19 does it, not as it could be done: stages 1 and 2 all-reduce gradients, though each rank needs only
    its part (use_multi_rank_bucket_allreduce, which is on by default). Stage 0 reduces fp32 gradients, since our bf16
    runs keep fp32 weights there. Stages 0 and 1 reduce once a step, stages 2 and 3 after every micro-batch. Stage 3
    gathers a weight once a micro-batch where it is used again within `distance` numbers, else in each pass.
    ZeRO++ (Wang et al. 2023): qwZ gathers weights as 8-bit numbers, hpZ gathers the backward pass's from a copy in the
    node, qgZ reduces gradients as 4-bit numbers by all-to-alls, in the node first.
    """
    stage, inside, node = int(variant[0]), ranks <= per_node, min(per_node, ranks)
    if stage == 0:
        return [Collective(ALL_REDUCE, 4 * parameters, ranks, inside)]
    if stage < 3:
        times = accumulation if stage == 2 else 1
        return [
            Collective(ALL_REDUCE, times * width * parameters, ranks, inside),
            Collective(ALL_GATHER, width * parameters, ranks, inside),
        ]
    scale = 4 / QUANTISED_GROUP
    gathered = (1 + scale if "qwZ" in variant or "++" in variant else width) * parameters
    share = gathered_again(parameters, distance) / parameters
    found = [Collective(ALL_GATHER, accumulation * gathered, ranks, inside)]
    if share:
        kept = "hpZ" in variant or "++" in variant
        whole = width * parameters if kept else gathered
        found.append(Collective(ALL_GATHER, accumulation * share * whole, node if kept else ranks, inside or kept))
    if "qgZ" in variant or "++" in variant:
        small = accumulation * (0.5 + scale) * parameters
        found.append(Collective(ALL_TO_ALL, small, node, True))
        if not inside:  # a node's sums, of which each of its ranks has one part
            found.append(Collective(ALL_TO_ALL, small / node, ranks // node, False))
    else:
        found.append(Collective(REDUCE_SCATTER, accumulation * width * parameters, ranks, inside))
    return found


def gathered_again(parameters: float, distance: float = REUSE_DISTANCE) -> float:
    """Weights that stage 3 gathers for the backward pass once more: the first ones, which it comes to last.

    Between a weight's two uses the trace passes all weights behind it twice.
    """
    return max(0.0, parameters - distance / 2)


def ulysses_traffic(
    hidden_size: int, layers: int, tokens: int, queries: int, ranks: int, width: int = 2, accumulation: int = 1
) -> list[Collective]:
    """All-to-alls of sequence parallelism on `ranks` ranks of one node, forward and backward.

    `tokens` and `queries`: packed tokens of a micro-batch, of all of the group's ranks, in the layers and in the last
    one. Each layer sends queries, keys, values and output in the forward pass and their gradients in the backward pass;
    a rank hands over its own part of the tokens.
    """
    if ranks == 1:
        return []
    numbers = hidden_size * ((layers - 1) * 4 * tokens + 2 * tokens + 2 * queries)
    return [Collective(ALL_TO_ALL, 2 * accumulation * numbers * width / ranks, ranks, True)]


def seconds(collectives: list[Collective], link: float = NVLINK) -> float:
    """One after the other."""
    return sum(collective.seconds_by(link) for collective in collectives)
