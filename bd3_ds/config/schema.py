"""The shape of a run's configuration: names, types and, by `rules.py`, which values a key takes.

Defaults and meanings stand in `configs/base.yaml`, once: a new key is a field here and a line there. Every field is
required here; OmegaConf fills the tree from base.yaml, the recipe and the command line, in that order, and refuses what
is not in this file.
"""

from __future__ import annotations

from dataclasses import dataclass

# OmegaConf reads annotations at run time, without what Annotated adds, and needs the classes of `typing`.
from typing import Annotated, Dict, List, Optional

from bd3_ds.config.registries import ESTIMATORS, OBJECTIVES
from bd3_ds.config.rules import choice, number, path

AR, MDLM, SEDD, BD3 = (
    "ar",
    "mdlm",
    "sedd",
    "bd3",
)  # what they mean, `registries.py` says
AUTO = -1  # train.micro_batch: auto, until `planning/micro_batch.py` has put a number in its place

# Types with the rule of `rules.py` that goes with them, where several keys share it.
Count = Annotated[int, number(above=0)]
WholeNumber = Annotated[int, number(at_least=0)]
Seed = Annotated[int, number(at_least=0, below=2**32, shown="0 … 2^32 - 1")]  # numpy and streaming take no larger ones
Positive = Annotated[float, number(above=0)]
NotNegative = Annotated[float, number(at_least=0)]
BelowOne = Annotated[float, number(at_least=0, below=1)]
Share = Annotated[float, number(at_least=0, at_most=1)]
Fraction = Annotated[float, number(above=0, below=1)]
Rate = Annotated[float, number(at_least=0, at_most=1, why="it is a masking rate")]
Spread = Annotated[float, number(at_least=0.001, at_most=10, why="a width on the scale of masking rates")]
Path = Annotated[str, path()]


@dataclass(frozen=True)
class ModelConfig:
    hidden_size: Count
    layers: Count
    heads: Count
    mlp_ratio: Count
    cond_size: Count
    dropout: BelowOne
    rope_base: Positive
    attention: str
    vocab_multiple: Count
    tie_embeddings: bool
    norm: Annotated[str, choice("layernorm", "rmsnorm")]
    norm_eps: Positive
    biases: Annotated[List[str], choice("norm", "qkv", "out", "mlp", "head")]
    mlp: Annotated[str, choice("gelu", "gelu_erf", "swiglu")]
    mlp_size: Optional[Count]
    kv_heads: Optional[Count]
    positions: Annotated[str, choice("rotary", "learned")]
    max_positions: Optional[Count]
    vocab_size: Optional[Count]
    mask_id: Optional[int]


@dataclass(frozen=True)
class DataConfig:
    train: Path
    mix: Annotated[Dict[str, float], path(in_keys=True)]
    length: Annotated[int, number(at_least=2, why="the first token is given, the rest scored")]
    shuffle: bool
    shuffle_algorithm: Annotated[str, choice("py1e", "py1br", "py1s", "py2s", "naive")]
    shuffle_seed: Seed
    canonical_nodes: Count
    cache: Annotated[str, path("a directory on a local disk such as /tmp/bd3-ds-{uid}")]
    cache_limit: Optional[str]
    predownload: Optional[Count]
    workers: WholeNumber
    document_mask: bool


@dataclass(frozen=True)
class GaussianConfig:
    mu: Rate
    sigma: Spread


@dataclass(frozen=True)
class BimodalConfig:
    w1: Fraction
    mu1: Rate
    sigma1: Spread
    mu2: Rate
    sigma2: Spread
    mu2_end: Optional[Rate]


@dataclass(frozen=True)
class ScheduleConfig:
    name: str
    t_min: float
    t_max: float
    defensive: BelowOne
    gaussian: GaussianConfig
    bimodal: BimodalConfig
    parameters: Dict[str, float]


@dataclass(frozen=True)
class WeightConfig:
    name: str
    sigmoid_k: Annotated[float, number(at_least=-50, at_most=50)]


@dataclass(frozen=True)
class FrequencyConfig:
    power: Share
    curriculum_steps: WholeNumber


@dataclass(frozen=True)
class ClipSearchConfig:
    method: str
    every: Count
    widths: List[Fraction]
    min_coverage: Share
    explore: Fraction
    set: str
    sequences: Count


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str
    block_size: Optional[Count]
    block_schedule: Dict[int, List[int]]
    views: Count
    schedule: ScheduleConfig
    weight: WeightConfig
    frequency: FrequencyConfig
    clip_search: ClipSearchConfig


@dataclass(frozen=True)
class OptimConfig:
    name: str
    lr: Positive
    beta1: BelowOne
    beta2: BelowOne
    eps: Positive
    weight_decay: NotNegative
    warmup_steps: WholeNumber
    decay: Annotated[str, choice("constant", "cosine", "linear")]
    decay_share: Annotated[float, number(above=0, at_most=1)]
    min_lr: NotNegative
    clip: Positive
    ema_decay: BelowOne
    parameters: Dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    total_steps: Count
    global_batch: Count
    micro_batch: Annotated[int, number(above=0, words={"auto": AUTO})]
    precision: Annotated[str, choice("bf16", "fp32")]
    fp32_matmul: Annotated[str, choice("highest", "high")]
    activation_checkpointing: Annotated[str, choice("none", "selective", "full")]
    compile: bool
    sequence_parallel: Count
    init_from: Optional[Path]
    log_every: Count
    validate_every: Optional[WholeNumber]
    validate_set: Optional[str]
    validate_sequences: Count
    checkpoint_every: Count
    keep_checkpoints: Count
    keep_every: Optional[Count]
    checkpoint_async: bool
    export_every: Count
    keep_exports: Optional[Count]


@dataclass(frozen=True)
class GuardConfig:
    max_skipped: WholeNumber
    spike: Annotated[str, choice("none", "warn", "skip", "stop")]
    spike_sigmas: Positive
    stall_seconds: WholeNumber


@dataclass(frozen=True)
class EvalConfig:
    sets: Annotated[Dict[str, str], path()]
    estimator: Annotated[str, choice(*ESTIMATORS)]
    views: Count
    batch: Count
    max_chunks: Optional[Count]
    samples: WholeNumber
    sample_length: Optional[Count]
    variance_batches: WholeNumber


@dataclass(frozen=True)
class RunConfig:
    run_dir: Annotated[str, path("a directory such as runs/mine")]
    seed: Seed
    plugins: List[str]
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    guards: GuardConfig
    eval: EvalConfig


def block_size(run: RunConfig) -> int:
    """L', the tokens denoised together: 1 for AR, all L for MDLM and SEDD, the configured one for BD3 (null: L)."""
    return OBJECTIVES[run.objective.name].block_size(run.objective.block_size, run.data.length)


def block_sizes(run: RunConfig, step: int) -> tuple[int, ...]:
    """The block sizes of which the step after `step` done ones takes one; those of the latest stage that has begun."""
    begun = [begin for begin in run.objective.block_schedule if begin <= step]
    return tuple(run.objective.block_schedule[max(begun)]) if begun else (block_size(run),)
