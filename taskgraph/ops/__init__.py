"""The standard ops of an LLM: shape, work and split rules, one table a stage, keyed by op kind.

The public functions take and return Values of a GraphBuilder and derive outputs and work from shapes.
A work counts what any implementation must do: the flops of the formula, and every operand moved once.
"""

from taskgraph.ops.dense import (
    NCCL_CHANNELS,
    NCCL_SMS,
    add,
    all_gather,
    all_reduce,
    argmax,
    attention,
    concat_rows,
    copy,
    decode_attention,
    embedding,
    gemm,
    reduce_scatter,
    rmsnorm,
    rope,
    rope_kv,
    slice_rows,
    swiglu,
)
from taskgraph.ops.experts import active_experts, experts, gated_add, route
from taskgraph.ops.latent import (
    latent_attention,
    latent_flops,
    latent_rope,
    paged_latent_decode,
    paged_latent_prefill,
    paged_latent_rope,
)
from taskgraph.ops.paged import copy_pages, paged_decode, paged_prefill, paged_rope
from taskgraph.ops.rules import (
    IN_TURN,
    SHAPE_RULES,
    SPLIT_RULES,
    WORK_RULES,
    apply,
    batch_axes,
    check_op,
    shape_rule,
    work_rule,
)
from taskgraph.ops.signatures import COLLECTIVES, SIGNATURES

__all__ = [
    "COLLECTIVES",
    "IN_TURN",
    "NCCL_CHANNELS",
    "NCCL_SMS",
    "SHAPE_RULES",
    "SIGNATURES",
    "SPLIT_RULES",
    "WORK_RULES",
    "active_experts",
    "add",
    "all_gather",
    "all_reduce",
    "apply",
    "argmax",
    "attention",
    "batch_axes",
    "check_op",
    "concat_rows",
    "copy",
    "copy_pages",
    "decode_attention",
    "embedding",
    "experts",
    "gated_add",
    "gemm",
    "latent_attention",
    "latent_flops",
    "latent_rope",
    "paged_decode",
    "paged_latent_decode",
    "paged_latent_prefill",
    "paged_latent_rope",
    "paged_prefill",
    "paged_rope",
    "reduce_scatter",
    "rmsnorm",
    "rope",
    "rope_kv",
    "route",
    "shape_rule",
    "slice_rows",
    "swiglu",
    "work_rule",
]
