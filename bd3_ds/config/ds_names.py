"""The keys of DeepSpeed's JSON that this trainer takes, and of which kind their values are.

DeepSpeed reads unknown keys outside zero_optimization as nothing at all, and answers those inside with a traceback.
Importing its own models would import torch, which checking a run must not; `tests/unit/test_ds_json.py` holds these
tables against them (DeepSpeed 0.19.8).
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

# DeepSpeed knows these as well. They are deprecated there, concern its own checkpoints, which are not used here, belong
# to other optimizers, or change what is computed.
ZERO_NOT_TAKEN = (
    "compute_grad_norm",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "ignore_unused_parameters",
    "leaf_module",
    "legacy_stage1",
    "load_from_fp32_weights",
    "override_module_apply",
    "parameter_alignment",
    "pipeline_loading_checkpoint",
    "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "zenflow",
    "zero_quantized_nontrainable_weights",
)

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
OFFLOAD_OPTIMIZER_NOT_TAKEN = ("cpuadam_cores_perc", "ratio", "super_offload")

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
