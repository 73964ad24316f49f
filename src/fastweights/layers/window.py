"""Exact softmax attention over the last few tokens, in time and memory linear in the length.

Notation: B batch, T queries, L keys (those of the T tokens and of at most W - 1 before), W window, H query
heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class WindowKeys(NamedTuple):
    """Keys and values that a window may see."""

    k: Float[Tensor, "B L G D"]
    v: Float[Tensor, "B L G D"]
    real: Bool[Tensor, "B L"] | None
    """False where there is none: padding, or a token of an earlier document; None if all are."""


def windowed(
    q: Float[Tensor, "B T H D"],
    new: WindowKeys,
    cache: Any,
    *,
    window: int,
    scale: float,
    bias: Float[Tensor, "H W"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """Window attention of a stream of text: after what `cache` has kept, among padding and several documents.

    Padding takes no room in the window: each row's real tokens stand together at its end.

    Args:
        q: queries of the new tokens.
        new: their keys and values.
        cache: a `WindowCache` to start from and leave the last keys in, or None.
        window: tokens that a query sees, at least 1.
        scale: factor on q·k.
        bias: added to the scaled q·k of each head and distance.
        starts: True where a document begins, whose tokens see none before.
    """
    T = q.shape[1]
    k, v, real = new if cache is None else cache.with_kept(new)
    if (seen := T + window - 1) < k.shape[1]:  # a cache may keep more than this layer sees
        k, v, real = k[:, -seen:], v[:, -seen:], None if real is None else real[:, -seen:]
    document = None if starts is None else pad(starts.cumsum(1), (k.shape[1] - T, 0))  # kept keys are of the first one
    back = None
    if real is not None and (real[:, :-1] & ~real[:, 1:]).any():
        order = real[:, -T:].byte().argsort(dim=1, stable=True)
        q, back = _take(q, order), order.argsort(1)
        order = real.byte().argsort(dim=1, stable=True)
        k, v, real = _take(k, order), _take(v, order), real.gather(1, order)
        document = None if document is None else document.gather(1, order)
    if cache is not None:
        cache.keep(WindowKeys(k, v, _of_the_last(document, real)))
    o = window_attention(q, k, v, window=window, scale=scale, bias=bias, key_mask=real, document=document)
    return o if back is None else _take(o, back)


def _of_the_last(document: Int[Tensor, "B L"] | None, real: Bool[Tensor, "B L"] | None) -> Bool[Tensor, "B L"] | None:
    """Which keys belong to each row's last document."""
    if document is None:
        return real
    last = document == document[:, -1:]
    return last if real is None else last & real


def _take(x: Float[Tensor, "B T H D"], order: Int[Tensor, "B T"]) -> Float[Tensor, "B T H D"]:
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B L G D"],
    v: Float[Tensor, "B L G D"],
    *,
    window: int,
    scale: float,
    bias: Float[Tensor, "H W"] | None = None,
    key_mask: Bool[Tensor, "B L"] | None = None,
    document: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """Causal softmax attention in which each query sees its own token and the `window` - 1 before it.

    Args:
        q: queries of the last T tokens.
        k: keys of the same tokens, after those of earlier ones.
        v: values, like `k`.
        window: tokens that a query sees, at least 1.
        scale: factor on q·k.
        bias: added to the scaled q·k of each head and distance, 0 being the query's own token.
        key_mask: False where a key is padding. A query that sees no key at all gets zeros.
        document: number of the document that each token belongs to; a query sees no other's keys.
    """
    length = q.shape[1]
    if length == 1:
        visible = k.shape[1]
        seen = key_mask
        if document is not None:
            same = document == document[:, -1:]
            seen = same if key_mask is None else same & key_mask
        mask = None if seen is None else seen[:, None, None, :]
        return _attend(q, k, v, scale, mask, None if bias is None else bias[:, :visible].flip(-1)[None, :, None])

    # Queries in blocks of W; a block sees its own W keys and the W before them, zeros in front of the first.
    blocks = -(-length // window)
    back = blocks * window - length
    front = window - (k.shape[1] - length)
    rows = _blocks(pad(q, (0, 0, 0, 0, 0, back)), window)
    keys = _blocks_with_predecessor(pad(k, (0, 0, 0, 0, front, back)), window)
    values = _blocks_with_predecessor(pad(v, (0, 0, 0, 0, front, back)), window)

    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)[None, :]
    distance = i + window - j  # in these coordinates query i's own key is at i + W
    band = (distance >= 0) & (distance < window)
    real = q.new_ones(1, k.shape[1], dtype=torch.bool) if key_mask is None else key_mask
    real = pad(real, (front, back)).unfold(1, 2 * window, window).flatten(0, 1)  # (B or 1)*N, 2W
    mask = band & real[:, None, :]
    if key_mask is None:
        mask = mask.repeat(q.shape[0], 1, 1)
    if document is not None:
        of_keys = pad(document, (front, back)).unfold(1, 2 * window, window).flatten(0, 1)  # B*N, 2W
        mask = mask & (of_keys[:, window:, None] == of_keys[:, None, :])
    o = _attend(
        rows, keys, values, scale, mask[:, None], None if bias is None else bias[None, :, distance.clamp(0, window - 1)]
    )
    return o.unflatten(0, (q.shape[0], blocks)).flatten(1, 2)[:, :length]


def _blocks(x: Float[Tensor, "B L H D"], window: int) -> Float[Tensor, "rows W H D"]:
    return x.unflatten(1, (-1, window)).flatten(0, 1)


def _blocks_with_predecessor(x: Float[Tensor, "B L G D"], window: int) -> Float[Tensor, "rows keys G D"]:
    blocks = x.unflatten(1, (-1, window))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)


def _attend(q, k, v, scale, mask, bias):
    """scaled_dot_product_attention in our layout; rows that see nothing give 0, not NaN."""
    added = mask
    if bias is not None:
        added = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, -torch.inf)
    o = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=added,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if mask is not None:
        o = o.masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0.0)
    return o
