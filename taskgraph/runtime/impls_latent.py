"""Multi-head latent attention on a CPU, by torch: the cheaper of its two forms for the step's tokens."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from taskgraph.graph.op import Op
from taskgraph.ops import latent_flops
from taskgraph.runtime.binders import Entry, Site, Tensors, binder, rope_table


@binder("latent_rope")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    q, kv, norm, positions, latents = ins
    cos, sin = (torch.from_numpy(t) for t in rope_table(op, latents.shape[1], op.integer("rotary")))
    numbers = (op.number("eps"), bool(op.attr("interleaved")))
    return partial(_latent_rope, q, kv, norm, positions, latents, outs[0], cos, sin, *numbers)


def _latent_rope(
    q: torch.Tensor,
    kv: torch.Tensor,
    norm: torch.Tensor,
    positions: torch.Tensor,
    latents: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    interleaved: bool,
) -> None:
    batch, length, _ = latents.shape
    each, rank, rotary = len(q) // batch, len(norm), 2 * cos.shape[1]
    places = (positions[:, None] + torch.arange(each)).flatten()
    if int(places.min()) < 0 or int(places.max()) >= length:
        raise ValueError("a position is outside the KV cache; make the cache longer or stop earlier")
    turn = cos[places].unsqueeze(1), sin[places].unsqueeze(1)
    out.copy_(q.view(out.shape))
    out[..., -rotary:] = _rotated(out[..., -rotary:].float(), *turn, interleaved)
    sequence = torch.arange(batch).repeat_interleave(each)
    latents[sequence, places, :rank] = F.rms_norm(kv[:, :rank], (rank,), norm, eps)
    key = _rotated(kv[:, None, rank:].float(), *turn, interleaved)
    latents[sequence, places, rank:] = key.squeeze(1).to(latents.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    low, high = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@dataclass(frozen=True, slots=True)
class _Latent:
    """What the two forms share: `up` (heads, keys then values, rank), `rotary` channels, and the scores' scale."""

    up: torch.Tensor
    keys: int
    rotary: int
    scale: float

    def absorbed(self, q: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(t, heads, v) of q (t, heads, dim) over cached (n, rank + rotary): heads attend over the latents."""
        latent = torch.einsum("thk,hkr->htr", q[..., : self.keys], self.up[:, : self.keys])
        query = torch.cat([latent, q[..., self.keys :].transpose(0, 1)], dim=-1)
        scores = (query @ cached.t()).float() * self.scale
        shares = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
        mixed = shares @ cached[:, : -self.rotary]
        return torch.einsum("htr,hvr->thv", mixed, self.up[:, self.keys :])

    def expanded(self, q: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The same with keys and values of all heads made first."""
        made = torch.einsum("nr,hkr->hnk", cached[:, : -self.rotary], self.up)
        shared = cached[:, -self.rotary :].expand(len(made), -1, -1)
        keys = torch.cat([made[..., : self.keys], shared], dim=-1)
        values = made[..., self.keys :]
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, mask, scale=self.scale)
        return mixed.transpose(0, 1)


@binder("latent_attention")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    q, positions, latents, up = ins
    heads, dim, rotary = q.shape[1], q.shape[2], op.integer("rotary")
    form = _Latent(up.view(heads, -1, up.shape[1]), dim - rotary, rotary, op.number("scale"))
    each = len(q) // len(latents)
    absorbed, expanded = latent_flops(each, op.integer("context"), heads, dim, rotary, tuple(up.shape))
    attend = form.absorbed if absorbed < expanded else form.expanded
    out = outs[0].view(len(latents), each, heads, -1)
    queries = q.view(len(latents), each, heads, dim)

    def run() -> None:
        for b, start in enumerate(positions.tolist()):
            seen = start + each
            mask = torch.ones(each, seen, dtype=torch.bool).tril(start)
            out[b] = attend(queries[b], latents[b, :seen], mask)

    return run
