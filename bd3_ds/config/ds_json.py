"""The DeepSpeed JSON owns memory and communication; everything else comes from the YAML and is filled in here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3_ds.config import ds_names
from bd3_ds.config.check import accumulation_steps
from bd3_ds.config.registries import OPTIMIZERS
from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.runtime.files import parse_json, require_writable, unique_keys
from bd3_ds.runtime.resources import find_shipped, shipped

DEFAULT = shipped("ds_configs") / "zero2.json"

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
    "compile": "train.compile",
    "sequence_parallel_size": "train.sequence_parallel",
    "checkpoint": "train.checkpoint_every",
    "tensorboard": "run_dir",
    "wandb": "run_dir",
    "csv_monitor": "run_dir",
    "data_efficiency": "data.*",
    "curriculum_learning": "data.*",
}


SECTIONS = {
    "zero_optimization": ds_names.ZERO,
    "zero_optimization.offload_optimizer": ds_names.OFFLOAD_OPTIMIZER,
    "zero_optimization.offload_param": ds_names.OFFLOAD_PARAM,
    "aio": ds_names.AIO,
    "data_types": ds_names.DATA_TYPES,
}

KINDS = {bool: "true or false", int: "a whole number, 0 or more", str: "a word", dict: 'an object such as {"key": 1}'}


def load_ds_json(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON; raises UserError with all that is wrong in it.

    That is: what the YAML owns, keys and values that DeepSpeed would ignore or not take, and offloading that cannot be.
    What depends on ranks and disks is in `check_place`, on the recipe in `check_optimizer`, on devices in
    `train/hardware.py`.
    """
    path = find_shipped(str(path), "ds_configs", ".json")
    if not path.is_file():
        known = [str(p) for p in path.parent.glob("*.json")] or [
            f"ds_configs/{p.name}" for p in DEFAULT.parent.glob("*.json")
        ]
        raise UserError(f"--deepspeed_config {path} not found; {did_you_mean(str(path), known)}")
    content = parse_json(path, "--deepspeed_config", _hjson)
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {path} must hold one JSON object")
    problems = [
        f"sets {key}, which the recipe owns; set {owner} there and leave it out here"
        for key, owner in OWNED_BY_YAML.items()
        if key in content
    ]
    taken = {key: value for key, value in content.items() if key not in OWNED_BY_YAML}
    problems = (
        problems or [*_names_and_kinds(taken, "", ds_names.TOP)] or [*_zero(content.get("zero_optimization", {}))]
    )
    if problems:
        raise UserError(*(f"--deepspeed_config {path} {problem}" for problem in problems))
    return content


def _hjson(text: str) -> Any:
    """As DeepSpeed reads its files: JSON, with comments and commas at the end where they are."""
    import hjson

    return hjson.loads(text, object_pairs_hook=unique_keys)


def check_place(content: dict[str, Any], world_size: int, local_size: int | None = None) -> None:
    """Raises UserError where a checked JSON does not fit the ranks or its NVMe folders are not there.

    `local_size` are the ranks of this machine, where known.
    """
    problems = [*_ranks(content.get("zero_optimization", {}), world_size, local_size), *_folders(content)]
    if problems:
        raise UserError(*(f"the DeepSpeed JSON sets zero_optimization.{problem}" for problem in problems))


def check_optimizer(content: dict[str, Any], run: RunConfig) -> None:
    """Raises UserError where a checked JSON offloads an optimizer that cannot be."""
    if offloads(content) and OPTIMIZERS[run.optim.name].on_host is None:
        able = [name for name in OPTIMIZERS if OPTIMIZERS[name].on_host is not None]
        raise UserError(
            "the DeepSpeed JSON sets zero_optimization.offload_optimizer, and there is no "
            f"optim.name={run.optim.name} for host memory; leave it out, or use optim.name={' or '.join(able)}"
        )


def _ranks(zero: dict[str, Any], world_size: int, local_size: int | None) -> Iterator[str]:
    size = zero.get("zero_hpz_partition_size", 1)
    if size < 1 or world_size % size:
        yield (
            f"zero_hpz_partition_size to {size}, which must divide the {world_size} ranks of the run; set it to the "
            "accelerators of one machine"
        )
    elif local_size is not None and local_size % size:
        yield (
            f"zero_hpz_partition_size to {size}, which must divide the {local_size} ranks of a machine, or weights "
            f"would be gathered between machines after all; set it to {local_size}"
        )
    if zero.get("zero_quantized_gradients") and local_size == world_size:
        yield (
            "zero_quantized_gradients, which acts between machines, and this run is on one: DeepSpeed would send "
            "gradients as they are; set it to false, or use ds_configs/zero3.json"
        )


def _folders(content: dict[str, Any]) -> Iterator[str]:
    for key in ("offload_optimizer", "offload_param"):
        section = content.get("zero_optimization", {}).get(key, {})
        if section.get("device") != "nvme":
            continue
        path = Path(section["nvme_path"])
        if not path.is_dir():
            yield f"{key}.nvme_path to '{path}', which is not a folder; make it, or name one on a fast local disk"
            continue
        try:
            require_writable(path)
        except UserError as error:
            yield f"{key}.nvme_path to '{path}': {error}"


def _names_and_kinds(content: dict[str, Any], section: str, known: dict[str, Any]) -> Iterator[str]:
    """Keys that are not taken and values of another kind, in this section and those inside it."""
    for key, value in content.items():
        name = f"{section}.{key}" if section else key
        if key in (foreign := ds_names.NOT_TAKEN.get(section, {})):
            yield f"sets {name}, which this trainer does not take though DeepSpeed knows it; {foreign[key]}"
        elif key not in known:
            yield f"sets {name}, which this trainer does not take; {did_you_mean(key, known)}"
        elif value == "auto":
            yield f"sets {name} to 'auto', which nobody fills in here; leave it out for DeepSpeed's default"
        elif not _is_a(value, known[key]):
            yield f"sets {name}, which must be {KINDS[known[key]]}, not {value!r}"
        elif name in SECTIONS:
            yield from _names_and_kinds(value, name, SECTIONS[name])


def _is_a(value: Any, kind: type) -> bool:
    """JSON's numbers such as 5e8 are whole as well."""
    if kind is int:
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)
    return isinstance(value, kind)


def _zero(zero: dict[str, Any]) -> Iterator[str]:
    """What is wrong in zero_optimization whose keys and kinds are right."""
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield f"sets zero_optimization.stage, which must be 0, 1, 2 or 3, not {stage}"
        return
    for key in zero:
        if key in ds_names.STAGE_3_ALONE and stage < 3:
            yield f"sets zero_optimization.{key}, which works at stage 3 alone; set stage to 3 or leave it out"
    devices = {}
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key, {})
        devices[key] = section.get("device", "none")
        yield from _offload(f"zero_optimization.{key}", section, stage)
    if "nvme" in devices.values() and devices["offload_optimizer"] == "none":
        yield (
            "sets zero_optimization.offload_param to NVMe and leaves the optimizer, which is several times as large, "
            'on the device; set offload_optimizer to {"device": "cpu"} or "nvme" as well'
        )


def _offload(name: str, section: dict[str, Any], stage: int) -> Iterator[str]:
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        yield f"sets {name}.device to '{device}'; {did_you_mean(device, ('none', 'cpu', 'nvme'))}"
    elif device != "none" and stage == 0:
        yield f"sets {name}.device to '{device}' at stage 0, which partitions nothing; set stage to 1, 2 or 3"
    elif device == "nvme" and stage < 3:
        yield f"sets {name}.device to 'nvme' at stage {stage}, which works at stage 3 alone; use 'cpu' or stage 3"
    elif device == "nvme" and "nvme_path" not in section:
        yield f"sets {name}.device to 'nvme' without a path; set {name}.nvme_path to a folder on a fast local disk"


def zero_stage(content: dict[str, Any]) -> int:
    """The ZeRO stage that a checked JSON asks for."""
    return int(content.get("zero_optimization", {}).get("stage", 0))


def offloads(content: dict[str, Any], what: str = "offload_optimizer") -> bool:
    """Whether a checked JSON keeps the optimizer, or "offload_param", off the device that computes."""
    return bool(content.get("zero_optimization", {}).get(what, {}).get("device", "none") != "none")


def complete_ds_json(content: dict[str, Any], run: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: the user's JSON with all that the YAML owns.

    DeepSpeed keeps no fp32 master weights for bf16 at stage 0; there the parameters stay fp32 and the engine runs the
    forward pass under autocast instead (`train/engine.py`), so bf16 is not enabled here.

    It is not given train.sequence_parallel: it shards and averages over all ranks alike, and counts a sequence
    once for every rank that works on it. The loss makes up for that (`parallel/sequence.py`).
    """
    return {
        **content,
        "train_batch_size": run.train.global_batch * run.train.sequence_parallel,
        "train_micro_batch_size_per_gpu": run.train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(run, world_size),
        "gradient_clipping": run.optim.clip,
        # Said although they are DeepSpeed 0.19.8's own: a NaN must make no update, and masters and moments stay fp32.
        "bf16": {
            "enabled": run.train.precision == "bf16" and zero_stage(content) > 0,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
        },
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # Which optimizer it is, and whether it can be offloaded, is known from its entry (`registries.OptimizerKind`).
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
