"""A rank's memory by kind, in bytes: what DeepSpeed (0.19) and the network hold at each moment of a step.

Three moments can be the highest: the head's loss at the end of the forward pass, the backward pass, the update. What
each ZeRO stage keeps was read in DeepSpeed's optimizers and is checked against measured peaks (`benchmarks/plan.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from bd3_ds.config.ds_json import offloads
from bd3_ds.config.registries import OPTIMIZERS
from bd3_ds.config.schema import RunConfig
from bd3_ds.model.build import CHUNK
from bd3_ds.model.dit import DiT
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.planning import activations
from bd3_ds.planning.communication import REUSE_DISTANCE

# DeepSpeed's own defaults, in numbers.
_BUCKET = 500_000_000
_LIVE = 1_000_000_000
_SUB_GROUP = 1_000_000_000

_DRAWN = 4 * CHUNK  # bytes of fp32 numbers that a rank draws at a time


@dataclass(frozen=True)
class Zero:
    """What the DeepSpeed JSON says about memory; sizes are in numbers, not in bytes.

    bucket: gradients that are reduced together, in `buckets` buffers; live: weights that stage 3 keeps gathered;
    sub_group: weights that it updates together; reuse: numbers within which a weight's next use keeps it gathered.
    ZeRO++: `copies` ranks hold all weights once more (1: none), and weights or gradients travel in fewer bits.
    """

    stage: int
    bucket: int
    buckets: int
    live: int
    sub_group: int
    offload_optimizer: bool
    offload_weights: bool
    reuse: int
    copies: int = 1
    quantised_weights: bool = False
    quantised_gradients: bool = False

    @property
    def variant(self) -> str:
        """Its name among `communication.VARIANTS`."""
        marks = {"qwZ": self.quantised_weights, "hpZ": self.copies > 1, "qgZ": self.quantised_gradients}
        shown = "++" if all(marks.values()) else " ".join(mark for mark, is_set in marks.items() if is_set)
        return f"{self.stage} ZeRO++" if shown == "++" else f"{self.stage} {shown}".strip()


def zero_of(ds_json: dict[str, Any], stage: int | None = None) -> Zero:
    """From a checked JSON; another `stage` than its own where one is given."""
    zero = ds_json.get("zero_optimization", {})
    own = int(zero.get("stage", 0))
    stage = own if stage is None else stage
    if stage != own:  # what is for one stage only, as offloading of what it shards, means nothing at another
        zero = {key: value for key, value in zero.items() if not key.startswith(("offload", "zero_")) or stage == 3}
    contiguous = bool(zero.get("contiguous_gradients", True))
    overlap = bool(zero.get("overlap_comm", False)) and stage in (1, 2)
    return Zero(
        stage=stage,
        bucket=int(zero.get("reduce_bucket_size", _BUCKET)),
        buckets=0 if stage == 0 or not contiguous else 2 if overlap else 1,
        live=int(zero.get("stage3_max_live_parameters", _LIVE)),
        sub_group=int(zero.get("sub_group_size", _SUB_GROUP)),
        offload_optimizer=stage > 0 and offloads({"zero_optimization": zero}),
        offload_weights=stage == 3 and offloads({"zero_optimization": zero}, "offload_param"),
        reuse=int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)),
        copies=int(zero.get("zero_hpz_partition_size", 1)),
        quantised_weights=bool(zero.get("zero_quantized_weights", False)),
        quantised_gradients=bool(zero.get("zero_quantized_gradients", False)),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `optimizer` holds its state (Adam's moments) and, where there are any, fp32 master weights.

    gathered: whole weights that stage 3 has put together. activations: kept by the layers; head: by the head; logits:
    chunk and sums while its loss is made; working: gradients inside a layer, and what is computed again; buckets:
    buffers of communication; update: fp32 gradients and what else the update takes. host: what is offloaded; starting:
    of the host while the run starts, beyond what stays (on CPUs that is where the rest is, too).
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    head: int
    logits: int
    working: int
    buckets: int
    update: int
    host: int
    starting: int
    held_gradients: int  # while a forward pass runs: those of earlier micro-batches
    first_gradients: int  # while the last layer's backward pass runs
    held_buckets: int  # outside the backward pass too
    reducing: int  # gradients laid side by side after the backward pass (stage 0)

    @property
    def always(self) -> int:
        """Held between steps."""
        return self.weights + self.optimizer + self.ema

    @property
    def moments(self) -> dict[str, int]:
        """The most that each part of a step holds."""
        passes = self.always + self.gathered
        return {
            "forward": passes + self.held_gradients + self.held_buckets + self.activations + self.head + self.logits,
            "backward": passes
            + max(
                self.first_gradients + self.activations + self.head + self.working + self.buckets,
                self.gradients + self.working + self.buckets,
                self.gradients + self.reducing,
            ),
            "update": self.always + self.gradients + self.update + self.held_buckets,
        }

    @property
    def peak(self) -> int:
        """The most of a step."""
        return max(self.moments.values())

    def as_dict(self) -> dict[str, Any]:
        """All kinds, the moments and the peak."""
        return {**asdict(self), "moments": self.moments, "peak": self.peak}


@cache
def parameter_count(network: DiTConfig) -> int:
    """Weights of a network, each once; it is not made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(network).parameters())


@cache
def largest_parameter(network: DiTConfig) -> int:
    """Numbers in the largest tensor of a network; it is not made."""
    with torch.device("meta"):
        return max(parameter.numel() for parameter in DiT(network).parameters())


def starting_bytes(run: RunConfig, network: DiTConfig, zero: Zero, world_size: int, cuda: bool) -> int:
    """Host memory of a rank while the run starts, beyond what it keeps (`materialise`; `benchmarks/start_memory.py`).

    Numbers drawn, the weights of `train.init_from` in fp32, and: at stage 3 on a GPU this rank's part of the weights,
    which DeepSpeed lays side by side on the host; on CPUs the largest tensor, whole until it is divided; at stages 1
    and 2 on CPUs the weights again, which DeepSpeed flattens.
    """
    width = 2 if run.train.precision == "bf16" and zero.stage > 0 else 4
    count = parameter_count(network)
    extra = _DRAWN + (4 * count if run.train.init_from is not None else 0)
    if zero.stage == 3:
        whole = count if zero.copies > 1 else largest_parameter(network)
        return extra + width * (-(-count // world_size) if cuda else whole)
    return extra + (width * count if zero.stage > 0 and not cuda else 0)


def memory_of(
    run: RunConfig, network: DiTConfig, block_size: int, zero: Zero, world_size: int, recompute: str, cuda: bool
) -> Memory:
    """A rank's memory for a run on `world_size` ranks with the given recomputation."""
    stage, ranks = zero.stage, world_size
    count = parameter_count(network)
    width = 2 if run.train.precision == "bf16" and stage > 0 else 4  # of weights and gradients
    shard = -(-count // ranks) if stage else count
    given = activations.pass_of(run, network, block_size, stage, cuda)

    weights = width * (shard if stage == 3 else count)
    weights += width * -(-count // zero.copies) if zero.copies > 1 else 0
    kept = len(OPTIMIZERS[run.optim.name].state) + (1 if stage else 0)  # fp32 numbers for each weight
    optimizer, ema = 4 * kept * shard, 4 * shard
    gathered = width * min(count, zero.live) if stage == 3 else 0
    gradients = width * (count if stage < 2 else shard)
    matrix = width * network.vocab_rows * network.hidden_size
    accumulates = run.train.global_batch * run.train.sequence_parallel > run.train.micro_batch * ranks
    held = gradients if accumulates or stage == 3 else 0
    # A group of weights at a time: its gradients in fp32, and again as they were. Nearly all weights are in one group.
    update = (4 + (width if width < 4 else 0)) * min(shard, zero.sub_group if stage == 3 else shard) if stage else 0
    host = (optimizer + ema if zero.offload_optimizer else 0) + (weights if zero.offload_weights else 0)
    if zero.offload_optimizer:
        optimizer, ema, update = 0, 0, 0
    buckets = zero.buckets * zero.bucket * width
    return Memory(
        weights=0 if zero.offload_weights else weights,
        gathered=gathered,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
        activations=activations.layers_bytes(given, recompute),
        head=activations.head_bytes(given),
        logits=activations.logits_bytes(given),
        working=activations.working_bytes(given, recompute),
        buckets=buckets,
        update=update,
        host=host,
        starting=starting_bytes(run, network, zero, world_size, cuda),
        held_gradients=held,
        first_gradients=held if held == width * count else held + matrix,
        held_buckets=buckets if stage == 3 else 0,
        reducing=4 * min(count, _BUCKET) if stage == 0 and ranks > 1 else 0,
    )
