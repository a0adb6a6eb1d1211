"""The keys of DeepSpeed's JSON that this trainer takes, and of which kind their values are.

DeepSpeed reads unknown keys outside zero_optimization as nothing at all, and answers those inside with a traceback.
Importing its own models would import torch, which checking a run must not; `tests/unit/config/test_ds_json.py` holds
these tables against them (DeepSpeed 0.19.8).
"""

from __future__ import annotations

TOP = {
    "zero_optimization": dict,
    "aio": dict,
    "communication_data_type": str,
    "seq_parallel_communication_data_type": str,
    "data_types": dict,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "comms_logger": dict,
    "flops_profiler": dict,
    "disable_python_gc": bool,
}

_ALWAYS = "leave it out: the trainer sets it"

TOP_NOT_TAKEN: dict[str, str] = {
    "zero_allow_untested_optimizer": _ALWAYS,
    "zero_force_ds_cpu_optimizer": "leave it out: offload_optimizer decides",
    "prescale_gradients": "leave it out: gradients are averaged",
    "gradient_predivide_factor": "leave it out: gradients are averaged",
    "sparse_gradients": "leave it out",
    "fp32_allreduce": 'set communication_data_type to "fp32" instead',
    "grad_accum_dtype": "set it inside data_types",
    "elasticity": "leave it out: run.py launch fits a run to the hosts that answer",
    "autotuning": "leave it out: run.py check plans micro-batch, stage and recomputation",
    "load_universal_checkpoint": "leave it out: a checkpoint continues on any number of ranks anyway",
    "dataloader_drop_last": "leave it out: the data order is the recipe's (data.*)",
    "pipeline": "leave it out: there are no pipeline stages here",
    "tensor_parallel": "leave it out; ranks share a sequence by train.sequence_parallel",
    "compression_training": "leave it out",
    "monitor_config": "leave it out: records and TensorBoard's files are in run_dir",
    "comet": "leave it out: records and TensorBoard's files are in run_dir",
}

ZERO: dict[str, type] = {
    "stage": int,
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "offload_param": dict,
    "offload_optimizer": dict,
    "sub_group_size": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_module_granularity_threshold": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool,
    "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool,
    "zero_quantized_gradients": bool,
    "memory_efficient_linear": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
}

_OWN_FILES = "leave it out: checkpoints and exports have a form of their own here"
_NOT_HERE = "leave it out"

# DeepSpeed knows these as well. They are deprecated there, concern its own checkpoints, which are not used here, belong
# to other optimizers, or change what is computed. With each, what to do instead.
ZERO_NOT_TAKEN: dict[str, str] = {
    "compute_grad_norm": "leave it out: the norm is always computed",
    "cpu_offload": 'set zero_optimization.offload_optimizer to {"device": "cpu"} instead',
    "cpu_offload_param": 'set zero_optimization.offload_param to {"device": "cpu"} instead',
    "cpu_offload_use_pin_memory": "set pin_memory in zero_optimization.offload_optimizer instead",
    "elastic_checkpoint": "leave it out: a checkpoint continues on any number of ranks anyway",
    "ignore_unused_parameters": _NOT_HERE,
    "leaf_module": _NOT_HERE,
    "legacy_stage1": "leave it out, or set zero_optimization.stage to 1",
    "load_from_fp32_weights": _OWN_FILES,
    "override_module_apply": _NOT_HERE,
    "parameter_alignment": _NOT_HERE,
    "pipeline_loading_checkpoint": _OWN_FILES,
    "round_robin_gradients": "leave it out: it deals gradients to the ranks in another order",
    "save_muon_momentum_buffer_in_memory": "leave it out: the recipe says which optimizer is taken (optim.name)",
    "stage3_gather_16bit_weights_on_model_save": _OWN_FILES,
    "stage3_gather_fp16_weights_on_model_save": _OWN_FILES,
    "zenflow": _NOT_HERE,
    "zero_quantized_nontrainable_weights": "leave it out: all weights are trained (zero_quantized_weights)",
}

OFFLOAD_OPTIMIZER: dict[str, type] = {
    "device": str,
    "nvme_path": str,
    "buffer_count": int,
    "pin_memory": bool,
    "pipeline_read": bool,
    "pipeline_write": bool,
    "fast_init": bool,
}

# A part of the optimizer on the accelerator would miss the learning rate that the trainer sets at every step.
OFFLOAD_OPTIMIZER_NOT_TAKEN: dict[str, str] = {
    "cpuadam_cores_perc": _NOT_HERE,
    "ratio": "leave it out: all of the optimizer is offloaded, or none",
    "super_offload": _NOT_HERE,
}

OFFLOAD_PARAM: dict[str, type] = {
    "device": str,
    "nvme_path": str,
    "buffer_count": int,
    "buffer_size": int,
    "max_in_cpu": int,
    "pin_memory": bool,
}

AIO: dict[str, type] = {
    "block_size": int,
    "queue_depth": int,
    "intra_op_parallelism": int,
    "single_submit": bool,
    "overlap_events": bool,
    "use_gds": bool,
}

DATA_TYPES: dict[str, type] = {"grad_accum_dtype": str}

STAGE_3_ALONE = tuple(
    key for key in ZERO if key.startswith(("stage3_", "zero_")) or key in ("offload_param", "sub_group_size")
)

# By section, "" being the top.
NOT_TAKEN = {
    "": TOP_NOT_TAKEN,
    "zero_optimization": ZERO_NOT_TAKEN,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER_NOT_TAKEN,
}
