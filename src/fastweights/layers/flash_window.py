"""Window attention of many tokens where no gradient is wanted: by torch's flash attention for CPUs, without logits.

It gives what `window.py` gives, and no derivative of the log-sum-exp by which the sinks are added.

Notation: B batch, T queries, L keys (those of the T tokens and of at most W - 1 before), W window, S sinks, C queries
of a block, N blocks, H query heads, G key/value heads, R heads that share a key, D width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from fastweights.layers.linear import needs_derivatives

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from fastweights.layers.window import Sinks

_LEAST, _MOST = 32, 128
"""Queries of a block, which sees W + C keys: half of them are of no use where C is W."""


def is_for_flash(
    q: Float[Tensor, "B T H D"], k: Float[Tensor, "B L G D"], v: Float[Tensor, "B L G V"], sinks: Sinks | None
) -> bool:
    """Whether this can do it: on a CPU, without gradients, for one document a row.

    Args:
        q: queries.
        k: keys.
        v: values.
        sinks: what queries see besides.
    """
    return (
        q.is_cpu
        and q.shape[1] > 1
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.shape[3] == v.shape[3]
        and (sinks is None or sinks.k.shape[1] == 1)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not needs_derivatives(q, k, v)
    )


def flash_window(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B L G D"],
    v: Float[Tensor, "B L G D"],
    *,
    window: int,
    scale: float,
    index: Int[Tensor, "_ T"],
    sinks: Sinks | None,
) -> Float[Tensor, "B T H D"]:
    """As `window_attention`, for what `is_for_flash` takes.

    Args:
        q: queries of the last T tokens.
        k: keys of the same tokens, after those of earlier ones.
        v: values, like `k`.
        window: tokens that a query sees.
        scale: factor on q·k.
        index: of each query in its document; below 0 it sees nothing and gets zeros.
        sinks: of each row's document, seen where they are W and more tokens behind.
    """
    (B, T, H, _), (L, G) = q.shape, k.shape[1:3]
    reach = min(window, L + -L % _LEAST)  # where the text is shorter than the window
    size = max(_LEAST, min(_MOST, reach // 2, T + -T % _LEAST))
    back, front = -T % size, reach - (L - T)
    q = q if q.stride(3) == 1 else q.contiguous()  # torch's kernel takes it for granted; padding makes k and v so
    k, v = (pad(x, (0, 0, 0, 0, front, back)) for x in (k, v))
    blocks = pad(q, (0, 0, 0, 0, 0, back)).view(B, -1, size, G, H // G, q.shape[3]).permute(0, 1, 3, 4, 2, 5)
    after = pad(index, (0, back), value=reach).unflatten(1, (-1, size))  # what these see is cut off
    seen = _seen(after, reach, H // G, q.dtype)
    rows = []
    for b in range(B):
        near_k, near_v = (_overlapping(x[b], size, reach) for x in (k, v))
        rows.append(_flash(blocks[b].flatten(2, 3), near_k, near_v, seen[b if len(seen) > 1 else 0], scale))
    o, log_sums = (torch.stack(x) for x in zip(*rows, strict=True))
    o = o.unflatten(3, (H // G, size)).permute(0, 1, 4, 2, 3, 5).reshape(B, -1, H, q.shape[3])[:, :T]
    log_sums = log_sums.unflatten(3, (H // G, size)).permute(0, 1, 4, 2, 3).reshape(B, -1, H)[:, :T]
    if sinks is not None:
        o = _with_sinks(o, log_sums, sinks, scale, index, window)
    return o if bool((index >= 0).all()) else o.masked_fill((index < 0)[:, :, None, None], 0.0)


def _overlapping(x: Float[Tensor, "L G D"], size: int, window: int) -> Float[Tensor, "N G keys D"]:
    """The W + C keys of each block, where they are."""
    length, heads, width = x.stride()
    shape = ((x.shape[0] - window) // size, x.shape[1], window + size, x.shape[2])
    return x.as_strided(shape, (size * length, heads, length, width), x.storage_offset())


def _seen(index: Int[Tensor, "_ N C"], window: int, heads: int, dtype: torch.dtype) -> Float[Tensor, "_ n 1 RC keys"]:
    """0 where a query sees a key, -inf elsewhere; for all blocks at once (n = 1) if they are alike."""
    size = index.shape[2]
    query, key = torch.arange(size)[:, None], torch.arange(window + size)
    distance = query + window - key
    if bool((index >= window - 1).all()):
        index = index[:1, :1]
    seen = (distance >= 0) & (distance <= index[..., None].clamp(max=window - 1))
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return added.repeat(1, 1, heads, 1)[:, :, None]


def _flash(
    q: Float[Tensor, "N G RC D"],
    k: Float[Tensor, "N G keys D"],
    v: Float[Tensor, "N G keys D"],
    seen: Float[Tensor, "n 1 RC keys"],
    scale: float,
) -> tuple[Float[Tensor, "N G RC D"], Float[Tensor, "N G RC"]]:
    """What a block sees, and the logarithm of the sum of its weights."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return attend(q, k, v, 0.0, False, attn_mask=seen, scale=scale)


def _with_sinks(
    o: Float[Tensor, "B T H D"],
    log_sums: Float[Tensor, "B T H"],
    sinks: Sinks,
    scale: float,
    index: Int[Tensor, "_ T"],
    window: int,
) -> Float[Tensor, "B T H D"]:
    """One softmax over both, from that over the window and its sum of weights."""
    far_k, far_v = (x[:, 0].permute(0, 2, 1, 3) for x in (sinks.k, sinks.v))  # (B, G, S, D)
    B, T, H, D = o.shape
    G, S = far_k.shape[1], far_k.shape[2]
    queries = sinks.q.unflatten(2, (G, H // G)).permute(0, 2, 1, 3, 4).reshape(B, G, T * (H // G), D)
    logits = (queries @ far_k.mT).float().view(B, G, T, H // G, S) * scale
    gone = index[:, :, None] - torch.arange(S, device=index.device) >= window
    # Not -inf, of which a softmax makes NaN where no sink has left the window yet.
    logits = logits.masked_fill_(~gone[:, None, :, None], torch.finfo(torch.float32).min)
    far = (logits.softmax(-1).to(far_v.dtype).view(B, G, -1, S) @ far_v).view(B, G, T, H // G, D)
    far = far.permute(0, 2, 1, 3, 4).reshape(B, T, H, D)
    share = (log_sums - logits.logsumexp(-1).permute(0, 2, 1, 3).reshape(B, T, H)).sigmoid()[..., None].to(o.dtype)
    return far + (o - far) * share
