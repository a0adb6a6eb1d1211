"""The shape of a run's configuration: names and types. Defaults and meanings stand in `configs/base.yaml`, once.

Every field is required here; OmegaConf fills the tree from base.yaml, the recipe and the command line, in that order,
and refuses what is not in this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional  # OmegaConf reads annotations at run time and wants the classes of `typing`

AR, MDLM, SEDD, BD3 = "ar", "mdlm", "sedd", "bd3"
OBJECTIVES = (AR, MDLM, SEDD, BD3)
AUTO = -1  # train.micro_batch: auto, until `planning/micro_batch.py` has put a number in its place


@dataclass(frozen=True)
class ModelConfig:
    hidden_size: int
    layers: int
    heads: int
    mlp_ratio: int
    cond_size: int
    dropout: float
    rope_base: float
    attention: str
    vocab_multiple: int
    tie_embeddings: bool
    norm: str
    norm_eps: float
    biases: List[str]
    mlp: str
    mlp_size: Optional[int]
    kv_heads: Optional[int]
    positions: str
    max_positions: Optional[int]
    vocab_size: Optional[int]
    mask_id: Optional[int]


@dataclass(frozen=True)
class DataConfig:
    train: str
    mix: Dict[str, float]
    length: int
    shuffle: bool
    shuffle_algorithm: str
    shuffle_seed: int
    canonical_nodes: int
    cache: str
    cache_limit: Optional[str]
    predownload: Optional[int]
    workers: int
    document_mask: bool


@dataclass(frozen=True)
class GaussianConfig:
    mu: float
    sigma: float


@dataclass(frozen=True)
class BimodalConfig:
    w1: float
    mu1: float
    sigma1: float
    mu2: float
    sigma2: float
    mu2_end: Optional[float]


@dataclass(frozen=True)
class ScheduleConfig:
    name: str
    t_min: float
    t_max: float
    defensive: float
    gaussian: GaussianConfig
    bimodal: BimodalConfig


@dataclass(frozen=True)
class WeightConfig:
    name: str
    sigmoid_k: float


@dataclass(frozen=True)
class FrequencyConfig:
    power: float
    curriculum_steps: int


@dataclass(frozen=True)
class ClipSearchConfig:
    method: str
    every: int
    widths: List[float]
    min_coverage: float
    explore: float
    set: str
    sequences: int


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str
    block_size: Optional[int]
    block_schedule: Dict[int, List[int]]
    views: int
    schedule: ScheduleConfig
    weight: WeightConfig
    frequency: FrequencyConfig
    clip_search: ClipSearchConfig


@dataclass(frozen=True)
class OptimConfig:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    warmup_steps: int
    decay: str
    min_lr: float
    clip: float
    ema_decay: float


@dataclass(frozen=True)
class TrainConfig:
    total_steps: int
    global_batch: int
    micro_batch: int
    precision: str
    fp32_matmul: str
    activation_checkpointing: str
    compile: bool
    sequence_parallel: int
    init_from: Optional[str]
    log_every: int
    validate_every: Optional[int]
    validate_set: Optional[str]
    validate_sequences: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: Optional[int]
    checkpoint_async: bool
    export_every: int
    keep_exports: Optional[int]


@dataclass(frozen=True)
class GuardConfig:
    max_skipped: int
    spike: str
    spike_sigmas: float
    stall_seconds: int


@dataclass(frozen=True)
class EvalConfig:
    sets: Dict[str, str]
    estimator: str
    views: int
    batch: int
    max_chunks: Optional[int]
    samples: int
    sample_length: Optional[int]
    variance_batches: int


@dataclass(frozen=True)
class RunConfig:
    run_dir: str
    seed: int
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    guards: GuardConfig
    eval: EvalConfig


def block_size(run: RunConfig) -> int:
    """L', the tokens denoised together: 1 for AR, all L for MDLM and SEDD, the configured one for BD3 (null: L)."""
    if run.objective.name == AR:
        return 1
    if run.objective.name in (MDLM, SEDD):
        return run.data.length
    return run.objective.block_size or run.data.length


def block_sizes(run: RunConfig, step: int) -> tuple[int, ...]:
    """The block sizes of which the step after `step` done ones takes one; those of the latest stage that has begun."""
    begun = [begin for begin in run.objective.block_schedule if begin <= step]
    return tuple(run.objective.block_schedule[max(begun)]) if begun else (block_size(run),)
