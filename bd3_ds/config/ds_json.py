"""The DeepSpeed JSON owns memory and communication; everything else comes from the YAML and is filled in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bd3_ds.config.check import accumulation_steps
from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.runtime.files import read_json

DEFAULT = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"

OWNED_BY_YAML = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.*",
    "scheduler": "optim.warmup_steps and optim.decay",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "tensorboard": "run_dir",
    "data_efficiency": "data.*",
    "curriculum_learning": "data.*",
}


def load_ds_json(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON; raises UserError for what the YAML owns and for an impossible ZeRO stage."""
    if not path.is_file():
        known = [str(p) for p in path.parent.glob("*.json")] or [
            f"ds_configs/{p.name}" for p in DEFAULT.parent.glob("*")
        ]
        raise UserError(f"--deepspeed_config {path} not found; {did_you_mean(str(path), known)}")
    content = read_json(path, "--deepspeed_config")
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {path} must hold one JSON object")
    problems = [
        f"--deepspeed_config {path} sets {key}, which the recipe owns; set {owner} there and leave it out here"
        for key, owner in OWNED_BY_YAML.items()
        if key in content
    ]
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f'--deepspeed_config {path}: zero_optimization must be an object such as {{"stage": 2}}')
    elif zero.get("stage", 0) not in (0, 1, 2, 3):
        problems.append(f"--deepspeed_config {path}: zero_optimization.stage must be 0, 1, 2 or 3, not {zero['stage']}")
    if problems:
        raise UserError(*problems)
    return content


def zero_stage(content: dict[str, Any]) -> int:
    """The ZeRO stage that a checked JSON asks for."""
    return int(content.get("zero_optimization", {}).get("stage", 0))


def complete_ds_json(content: dict[str, Any], run: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: the user's JSON with all that the YAML owns.

    DeepSpeed keeps no fp32 master weights for bf16 at stage 0; there the parameters stay fp32 and the engine runs the
    forward pass under autocast instead (`train/engine.py`), so bf16 is not enabled here.

    It is told nothing of train.sequence_parallel: it shards and averages over all ranks alike, and counts a sequence
    once for every rank that works on it. The loss makes up for that (`parallel/sequence.py`).
    """
    return {
        **content,
        "train_batch_size": run.train.global_batch * run.train.sequence_parallel,
        "train_micro_batch_size_per_gpu": run.train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(run, world_size),
        "gradient_clipping": run.optim.clip,
        "bf16": {"enabled": run.train.precision == "bf16" and zero_stage(content) > 0},
        "zero_allow_untested_optimizer": True,
    }
