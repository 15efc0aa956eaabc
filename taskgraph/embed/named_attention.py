"""transformers' attention as one named operator: `attn_implementation="taskgraph"`.

transformers calls what its public AttentionInterface has under that name. The operator is torch's scaled dot-product
attention with heads in groups, wherever it runs; in a graph it is recognised as it stands.
"""

from typing import Any

import torch

from taskgraph.errors import BackendUnavailable

NAME = "taskgraph"


@torch.library.custom_op("taskgraph::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """softmax(q k^T scale + mask) v of q (b, h, t, d), k and v (b, g, s, d), g a divisor of h -> (b, h, t, d)."""
    grouped = query.shape[1] != key.shape[1]
    made = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=grouped
    )
    out = _out(query, value)
    return out.copy_(made)


def _out(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(b, h, t, d), the heads of a token one after another in memory."""
    batch, heads, rows, _ = query.shape
    return query.new_empty((batch, rows, heads, value.shape[3])).transpose(1, 2)


@attention.register_fake
def shape_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The layout of what `attention` returns."""
    return _out(query, value)


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' layers call; (b, t, h, d) and no weights of attention."""
    if dropout:
        raise BackendUnavailable(
            "attn_implementation='taskgraph' is for inference: dropout must be 0; call model.eval()."
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    alone = attention_mask is None and query.shape[2] > 1 and bool(causal)
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    return attention(query, key, value, attention_mask, alone, scale).transpose(1, 2), None


def register_attention() -> str:
    """Make transformers know `attn_implementation="taskgraph"`; returns that name. BackendUnavailable without
    transformers, or with one that has no public interface of attention."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise BackendUnavailable(
            "attn_implementation='taskgraph' needs transformers with AttentionInterface and AttentionMaskInterface "
            f"(4.57 or newer): {error}"
        ) from error
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
