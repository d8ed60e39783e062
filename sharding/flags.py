"""What XLA is told of TPUs, by generation, where it helps a step whose collectives are written.

`dsjax plan` compiles with the same. Whoever sets a flag in LIBTPU_INIT_ARGS is obeyed.
"""

from __future__ import annotations

import os

_SUMS_BESIDE = {
    # Gradients are summed and scattered by the sparse cores, beside the matrix units.
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_reduce_scatter_offload_tracing": "true",
    "xla_tpu_enable_all_reduce_offload_tracing": "true",
    # They want what they move in the layout of the other cores, and by one program for both.
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disable_megacore_partitioning": "true",
}
_SUMS_HIDDEN = {
    # What a matmul would take along inside of its own loop cannot be handed over.
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    # Instructions are put in order once more when it is known what is handed over: else each sum is
    # waited for where it begins.
    "xla_tpu_rerun_latency_hiding_scheduler_post_sc_assignment": "true",
}
_TOKENS_BESIDE = {
    # Tokens travel to their experts while others of the layer's products go on.
    "xla_tpu_enable_async_ragged_all_to_all": "true",
}
_WEIGHTS_BESIDE = {
    # Weights are gathered by the sparse cores as well, along one axis of the torus or two,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    # and what they are to do may wait for them in a queue, instead of the other cores.
    "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": "true",
    "xla_tpu_enable_concurrent_sparse_core_offloading": "true",
}
FLAGS: dict[str, dict[str, str]] = {
    "v5p": _SUMS_BESIDE | _SUMS_HIDDEN | _TOKENS_BESIDE | _WEIGHTS_BESIDE,
    # Its sparse cores take sums and gathers of weights without being told.
    "tpu7x": _SUMS_HIDDEN
    | _TOKENS_BESIDE
    | {
        # They would also take rows of tokens, but libtpu 0.0.42.1 aborts at rows of 7,168 numbers:
        # "Not enough space for TILESPMEM spill".
        "xla_tpu_offload_gather_to_sparsecore": "false",
        # Nor are arrays laid out anew there: what the next product waits for would stand in their
        # queue behind the gathers and sums of a whole layer.
        "xla_tpu_enable_offloading_copy_to_sparsecore": "false",
        "xla_tpu_enable_offloading_reshape_to_sparsecore": "false",
        # Arrays of bfloat16 lie in tiles of eight rows, as kernels take them, and not of sixteen.
        "xla_tpu_control_large_2nd_minor_layout_for_x16": "false",
        # Exchanges, gathers and sums are begun early and waited for late: all three were tried
        # together, in a step that holds 88 of 103 GB.
        "xla_tpu_scheduler_percent_shared_memory_limit": "150",
        "xla_tpu_enable_latency_hiding_layer_scheduler": "false",
        "xla_tpu_enable_layer_scheduler_for_dependent_collectives": "true",
        # bfloat16 is multiplied as it is, and not in two halves.
        "xla_tpu_bf16_emission_mode": "NATIVE_EMISSION",
    },
}


def set_flags(accelerator: str) -> None:
    """Add those of a generation, such as v5p or v5p-1024, to the environment, before XLA is loaded.

    None are known of other accelerators, and nothing is changed then.
    """
    known = FLAGS.get(accelerator.partition("-")[0], {})
    asked = os.environ.get("LIBTPU_INIT_ARGS", "")
    new = [f"--{flag}={value}" for flag, value in known.items() if f"{flag}=" not in asked]
    if new:
        os.environ["LIBTPU_INIT_ARGS"] = " ".join([*new, asked]).rstrip()
