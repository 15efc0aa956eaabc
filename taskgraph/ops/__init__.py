"""The standard ops of an LLM, one record a kind (`Kind`), and what other packages add theirs by (`register`).

The public functions take and return Values of a GraphBuilder and derive outputs and work from shapes.
A work counts what any implementation must do: the flops of the formula, and every operand moved once.
"""

from taskgraph.ops.algebra import layer_norm, matmul, reduce, reduce_max, reduce_mean, reduce_sum, softmax
from taskgraph.ops.attention import (
    TokenPlaces,
    attention,
    decode_attention,
    paged_decode,
    paged_prefill,
    paged_rope,
    rope,
    rope_kv,
)
from taskgraph.ops.axes import concat, expand, index_select, permute, reshape, slice_axis, take_along, transpose
from taskgraph.ops.dense import add, argmax, embedding, gemm, rmsnorm, swiglu
from taskgraph.ops.experts import RouteSpec, active_experts, experts, gated_add, route
from taskgraph.ops.kinds import KINDS, Kind, apply, batch_axes, check_op, register, work_of
from taskgraph.ops.latent import (
    LatentRopeSpec,
    LatentSpec,
    latent_attention,
    latent_flops,
    latent_rope,
    paged_latent_decode,
    paged_latent_prefill,
    paged_latent_rope,
)
from taskgraph.ops.moves import (
    COLLECTIVES,
    NCCL_CHANNELS,
    NCCL_SMS,
    all_gather,
    all_reduce,
    concat_rows,
    copy,
    copy_pages,
    reduce_scatter,
    slice_rows,
)
from taskgraph.ops.pointwise import (
    cast,
    div,
    elementwise,
    exp,
    gelu,
    log,
    maximum,
    minimum,
    mul,
    neg,
    relu,
    rsqrt,
    sigmoid,
    silu,
    sqrt,
    sub,
    tanh,
    where,
)
from taskgraph.ops.rotary import Llama3Stretch, RopeSpec, YarnStretch
from taskgraph.ops.sampling import draw, feed
from taskgraph.ops.signatures import (
    AXES,
    COUNT,
    DTYPE,
    FLAG,
    NUMBER,
    PLACE,
    POSITIVE,
    SMALL,
    WORD,
    Attrs,
    Shapes,
    Signature,
    moved,
    need,
    need_floats,
)
