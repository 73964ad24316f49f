"""Exact softmax attention over the last few tokens and a document's first ones, linear in the length.

A query sees its own token and the W - 1 before it, and of its document's first S tokens, the sinks, those that have
left its window (Xiao et al., arXiv 2309.17453: softmax heads rest on them).

Notation: B batch, T queries, L keys (those of the T tokens and of at most W - 1 before), W window, S sinks, N blocks of
W queries, H query heads, G key/value heads, D width of a head, R rows of what is computed at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from fastweights.layers.eight_bits import rounded
from fastweights.layers.flash_window import flash_window, is_for_flash
from fastweights.layers.rules import TokenMarks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class WindowTokens(NamedTuple):
    """What a window is told of the new tokens."""

    q: Float[Tensor, "B T H D"]
    k: Float[Tensor, "B T G D"]
    v: Float[Tensor, "B T G V"]
    sink_q: Float[Tensor, "B T H D"]
    """The queries for sinks, from which a rotary embedding never takes them farther than the window and they reach."""


class WindowEmbeddings(NamedTuple):
    """Rotary embeddings, cosines and sines, for more than the tokens' own places."""

    sinks: tuple[Tensor, Tensor] | None
    """Of queries for sinks; None without sinks."""
    leaving: tuple[Tensor, Tensor] | None
    """What takes the embedding off the key that leaves the window beside each token; None where it stays on."""


class KeysAndValues(NamedTuple):
    """Of some tokens, such as sinks."""

    k: Float[Tensor, "B L G D"]
    v: Float[Tensor, "B L G V"]


class Leaving(NamedTuple):
    """The tokens that leave the window, each beside the one that is the last to see it."""

    k: Float[Tensor, "B T G D"]
    v: Float[Tensor, "B T G V"]
    any: Bool[Tensor, "B T"] | None
    """False beside a token that none leaves the window of, whose key and value mean nothing; None if there are none."""


class Sinks(NamedTuple):
    """What queries see besides their window."""

    q: Float[Tensor, "B T H D"]
    k: Float[Tensor, "B N S G D"]
    """Of the document that each block of W queries begins in: no other has lost a token from the window of one of them.

    N may be 1, for all blocks.
    """
    v: Float[Tensor, "B N S G V"]


def token_index(length: int, before: int | Int[Tensor, "B 1"], marks: TokenMarks, device: Any = None) -> Tensor:
    """How many tokens of its document come before each of the new ones, (B or 1, T); -1 for padding.

    Args:
        length: T.
        before: tokens of its document that each row has read.
        marks: padding and borders of documents among the new ones.
        device: of the result, where neither of these says it.
    """
    real, starts = marks
    if real is None:
        device = device if starts is None else starts.device
        seen = torch.arange(length, device=device)[None]
    else:
        seen = real.long().cumsum(1) - 1
    index = seen + before
    if starts is not None:
        start = torch.where(starts, seen, -1).cummax(1).values
        index = torch.where(start < 0, index, seen - start)
    return index if real is None else index.masked_fill(~real, -1)


class _Places(NamedTuple):
    """Where the new tokens stand, each row's real ones together at its end."""

    index: Int[Tensor, "_ T"]
    before: int | Int[Tensor, "B 1"]
    """Tokens of its document that each row had read."""
    first: int | Int[Tensor, "B 1"]
    """Place of the first that is real."""
    alike: bool
    """Whether all rows are at the same place of their documents, and no document begins among these."""

    def after(self) -> Int[Tensor, "B 1"] | None:
        """Tokens of its document that each row has read now; None if a count of all tokens says it."""
        last = self.index[:, -1:]
        return None if self.alike else torch.where(last < 0, self.before, last + 1)

    def starts(self) -> Int[Tensor, "_ T"]:
        """Place of the first token of each one's document, below `first` if it was read before."""
        own = torch.arange(self.index.shape[1], device=self.index.device) - self.index
        return torch.where(self.index < 0, self.first - self.before, own)


def windowed(
    new: WindowTokens,
    cache: Any,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    bias: Float[Tensor, "H bias"] | None = None,
    marks: TokenMarks | None = None,
    leaving: bool = False,
    eight_bits: bool = False,
) -> tuple[Float[Tensor, "B T H V"], Leaving | None]:
    """Window attention of a stream of text: after what `cache` has kept, among padding and several documents.

    Padding takes no room in the window: each row's real tokens stand together at its end.

    Args:
        new: the new tokens.
        cache: a `WindowCache` to start from and leave the last keys in, or None.
        window: tokens that a query sees, at least 1.
        scale: factor on q·k.
        sinks: first tokens of its document that a query sees besides.
        bias: added to the scaled q·k of each head: for W distances, then for S sinks.
        marks: padding and borders of documents among the new tokens.
        leaving: whether what leaves the window is wanted.
        eight_bits: whether the window has keys and values in eight bits (`eight_bits.py`), as what leaves it then is;
            sinks have them as they are.

    Returns:
        What each token sees; and if wanted the key and the value of the token that each one is the last to see in its
        window, where that is one of its document and no sink.
    """
    real, starts = marks = marks or TokenMarks()
    T, back = new.q.shape[1], None
    if real is not None:  # what padding holds may be anything, and 0 times NaN is NaN
        new = WindowTokens(*(x.masked_fill(~real[:, :, None, None], 0) for x in new))
    before = 0 if cache is None else cache.document_length()
    index = token_index(T, before, marks, new.q.device)
    k, v = (rounded(new.k), rounded(new.v)) if eight_bits else (new.k, new.v)
    k, v = (k, v) if cache is None else cache.with_kept(k, v)
    if (seen := T + window - 1) < k.shape[1]:  # a cache may keep more than this layer sees
        k, v = k[:, -seen:], v[:, -seen:]
    if real is not None and (order := _real_last(real, k.shape[1] - T, before)) is not None:
        k, v = _take(k, order), _take(v, order)
        order = real.byte().argsort(dim=1, stable=True)
        new, back = WindowTokens(*(_take(x, order) for x in new)), order.argsort(1)
        index = index.gather(1, order)
    first = 0 if real is None else T - real.sum(1, keepdim=True)
    places = _Places(index, before, first, real is None and starts is None and isinstance(before, int))
    left = _leaving(KeysAndValues(k, v), places, window, sinks) if leaving else None
    seen_sinks = last_sinks = None
    if sinks:
        seen_sinks, last_sinks = _sinks(new, cache, places, window, sinks)
    if cache is not None:
        cache.keep(KeysAndValues(k, v), last_sinks, places.after())
    index = None if T == 1 and places.alike else index
    o = window_attention(new.q, k, v, window=window, scale=scale, bias=bias, index=index, sinks=seen_sinks)
    if back is None:
        return o, left
    if left is not None:
        left = Leaving(_take(left.k, back), _take(left.v, back), None if left.any is None else left.any.gather(1, back))
    return _take(o, back), left


def _real_last(real: Bool[Tensor, "B T"], kept: int, before: int | Int[Tensor, "B 1"]) -> Int[Tensor, "B L"] | None:
    """The order in which kept and new tokens that are real come last; None if they do."""
    was_real = torch.arange(kept, device=real.device) >= kept - before
    real = torch.cat((was_real.expand(len(real), kept), real), 1)
    if real.is_cpu and not (real[:, :-1] & ~real[:, 1:]).any():  # a GPU would have to be waited for
        return None
    return real.byte().argsort(dim=1, stable=True)


def _take(x: Float[Tensor, "B L H D"], order: Int[Tensor, "B T"]) -> Float[Tensor, "B T H D"]:
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _leaving(kept: KeysAndValues, places: _Places, window: int, sinks: int) -> Leaving:
    """The token W - 1 before each new one, if its document has one there that is no sink."""
    T, first = places.index.shape[1], window - 1 + sinks
    front = T + window - 1 - kept.k.shape[1]
    k, v = (pad(x[:, :T], (0, 0, 0, 0, front, 0))[:, :T] for x in kept)
    if places.alike and isinstance(places.before, int) and places.before >= first:
        return Leaving(k, v, None)
    return Leaving(k, v, (places.index >= first).expand(len(k), T))


def _sinks(
    new: WindowTokens, cache: Any, places: _Places, window: int, sinks: int
) -> tuple[Sinks | None, KeysAndValues | None]:
    """Those that the queries see, None if they see none; and those of each row's last document, for a cache."""
    B, T = new.q.shape[:2]
    before, kept = places.before, None if cache is None else cache.sinks
    if places.alike and kept is not None and before >= sinks:  # the most frequent case by far: a text goes on
        last, seen_k, seen_v = kept, kept.k[:, None], kept.v[:, None]
    else:
        starts = places.starts().expand(B, T)
        if kept is None:
            kept = KeysAndValues(*(x.new_zeros(B, sinks, *x.shape[2:]) for x in (new.k, new.v)))
        k, v = torch.cat((kept.k, new.k), 1), torch.cat((kept.v, new.v), 1)
        of_last = _first_of(k, v, places, starts[:, -1:], sinks)
        seen_k, seen_v = of_last if places.alike else _first_of(k, v, places, starts[:, ::window], sinks)
        last = None if cache is None else KeysAndValues(*(x[:, 0] for x in of_last))
    if isinstance(before, int) and before + T <= window:
        return None, last
    if places.alike and T == 1 and (visible := before - window + 1) < sinks:
        seen_k, seen_v = seen_k[:, :, :visible], seen_v[:, :, :visible]
    return Sinks(new.sink_q, seen_k, seen_v), last


def _first_of(
    k: Float[Tensor, "B L G D"],
    v: Float[Tensor, "B L G V"],
    places: _Places,
    starts: Int[Tensor, "B N"],
    sinks: int,
) -> tuple[Float[Tensor, "B N S G D"], Float[Tensor, "B N S G V"]]:
    """Keys and values of the first tokens of documents that begin at `starts`.

    `k` and `v` are those of the sinks kept so far, then those of the new tokens.
    """
    number = torch.arange(sinks, device=k.device)
    place = starts[:, :, None] + number
    was_read = place < (places.first if isinstance(places.first, int) else places.first[:, :, None])
    order = torch.where(was_read, number, (sinks + place).clamp(max=k.shape[1] - 1))
    rows = torch.arange(len(k), device=k.device)[:, None, None]
    return k[rows, order], v[rows, order]


def window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B L G D"],
    v: Float[Tensor, "B L G V"],
    *,
    window: int,
    scale: float,
    bias: Float[Tensor, "H bias"] | None = None,
    index: Int[Tensor, "_ T"] | None = None,
    sinks: Sinks | None = None,
) -> Float[Tensor, "B T H V"]:
    """Causal softmax attention in which each query sees its own token and the `window` - 1 before it, and sinks.

    Args:
        q: queries of the last T tokens.
        k: keys of the same tokens, after those of earlier ones.
        v: values, like `k`.
        window: tokens that a query sees, at least 1.
        scale: factor on q·k.
        bias: added to the scaled q·k of each head, for each distance, 0 being the query's own token, and each sink.
        index: of each query in its document, whose tokens stand together; it sees no earlier ones. One below 0 sees
            nothing and gets zeros. By default all keys are of one document, which has lost all sinks from the window.
        sinks: what queries see that are W and more tokens behind it.
    """
    if torch.compiler.is_exporting():
        return _exported(q, k, v, window, scale, bias, index, *(sinks or (None, None, None)))
    if q.shape[1] > 1:
        if index is None:
            index = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[None]
        if bias is None and is_for_flash(q, k, v, sinks):
            return flash_window(q, k, v, window=window, scale=scale, index=index, sinks=sinks, plainly=_plainly)
    return written_out(q, k, v, window, scale, bias, index, sinks)


def _plainly(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, index: Tensor, *sinks: Tensor) -> Tensor:
    """`window_attention` by operations of torch that can be differentiated any number of times."""
    return written_out(q, k, v, window, scale, None, index, Sinks(*sinks) if sinks else None)


def written_out(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B L G D"],
    v: Float[Tensor, "B L G V"],
    window: int,
    scale: float,
    bias: Float[Tensor, "H bias"] | None,
    index: Int[Tensor, "_ T"] | None,
    sinks: Sinks | None,
) -> Float[Tensor, "B T H V"]:
    """With logits, of which each block has a matrix; `index` is given for more than one query."""
    B, T = q.shape[:2]
    blocks, distance, mask, near_bias = 1, None, None, None
    if T > 1:
        assert index is not None
        # Queries in blocks of W; a block sees its own W keys and the W before them, zeros in front of the first.
        blocks = -(-T // window)
        back, front = blocks * window - T, window - (k.shape[1] - T)
        q = _blocks(pad(q, (0, 0, 0, 0, 0, back)), window)
        sinks = sinks and sinks._replace(q=_blocks(pad(sinks.q, (0, 0, 0, 0, 0, back)), window))
        k, v = (_blocks_with_predecessor(pad(x, (0, 0, 0, 0, front, back)), window) for x in (k, v))
        index = pad(index, (0, back), value=-1).unflatten(1, (-1, window)).expand(B, -1, -1).flatten(0, 1)
        i, j = torch.arange(window, device=q.device), torch.arange(2 * window, device=q.device)
        distance = i[:, None] + window - j  # in these coordinates query i's own key is at i + W
    elif bias is not None or index is not None:
        distance = torch.arange(k.shape[1] - 1, -1, -1, device=q.device)[None]
    if distance is not None and index is not None:
        mask = (distance >= 0) & (distance <= index[:, :, None].clamp(max=window - 1))
    if distance is not None and bias is not None:
        near_bias = bias[None, :, distance.clamp(0, window - 1)]
    near = _Part(q, k, v, near_bias, mask)
    if sinks is None:
        o = _attend(near, scale)
    else:
        far_k, far_v = (x.expand(-1, blocks, -1, -1, -1).flatten(0, 1) for x in (sinks.k, sinks.v))
        S = far_k.shape[1]
        far_bias = None if bias is None else bias[None, :, None, window : window + S].expand(-1, -1, q.shape[1], -1)
        gone = None if index is None else index[:, :, None] - torch.arange(S, device=q.device) >= window
        o = _attend_to_both(near, _Part(sinks.q, far_k, far_v, far_bias, gone), scale)
    return o if T == 1 else o.unflatten(0, (B, blocks)).flatten(1, 2)[:, :T]


@torch.library.custom_op("fastweights::window_attention", mutates_args=())
def _exported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    bias: Tensor | None,
    index: Tensor | None,
    sink_q: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
) -> Tensor:
    """`window_attention` as one operation of an exported program: of its blocks, there is a number for each length."""
    sinks = None
    if sink_q is not None and sink_k is not None and sink_v is not None:
        sinks = Sinks(sink_q, sink_k, sink_v)
    o = window_attention(q, k, v, window=window, scale=scale, bias=bias, index=index, sinks=sinks)
    return o.contiguous()


@_exported.register_fake
def _(q, k, v, window, scale, bias, index, sink_q, sink_k, sink_v):
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _blocks(x: Float[Tensor, "B L H D"], window: int) -> Float[Tensor, "R W H D"]:
    return x.unflatten(1, (-1, window)).flatten(0, 1)


def _blocks_with_predecessor(x: Float[Tensor, "B L G D"], window: int) -> Float[Tensor, "R keys G D"]:
    blocks = x.unflatten(1, (-1, window))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)


class _Part(NamedTuple):
    """What a softmax is taken over, or a part of it."""

    q: Float[Tensor, "R T H D"]
    k: Float[Tensor, "R L G D"]
    v: Float[Tensor, "R L G V"]
    bias: Float[Tensor, "_ H T L"] | None
    mask: Bool[Tensor, "_ T L"] | None


def _attend(part: _Part, scale: float) -> Float[Tensor, "R T H V"]:
    """scaled_dot_product_attention in our layout; queries that see nothing give 0, not NaN."""
    added = mask = None if part.mask is None else part.mask[:, None]
    if part.bias is not None:
        added = part.bias.to(part.q.dtype)
        added = added if mask is None else added.masked_fill(~mask, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in part[:3])
    grouped = q.shape[1] != k.shape[1]
    o = scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=grouped)
    return (o if mask is None else o.masked_fill(~mask.any(-1, keepdim=True), 0.0)).transpose(1, 2)


def _attend_to_both(near: _Part, far: _Part, scale: float) -> Float[Tensor, "R T H V"]:
    """One softmax over two parts, each with queries of its own, written out."""
    (R, T, H, _), G = near.q.shape, near.k.shape[2]
    # The heads of a group are more queries of the keys that they share: (R, G, heads*T, D) and (R, G, D, L).
    parts = [part.q.transpose(1, 2).reshape(R, G, H // G * T, -1) @ part.k.permute(0, 2, 3, 1) for part in (far, near)]
    logits = torch.cat(parts, -1) * scale
    if near.bias is not None and far.bias is not None:
        bias = torch.cat((far.bias, near.bias), -1).to(logits.dtype)
        logits = logits + bias.view(-1, G, H // G * T, logits.shape[-1])
    seen = None
    if near.mask is not None and far.mask is not None:
        mask = torch.cat((far.mask, near.mask), -1)
        # Not -inf, which gives a query that sees nothing NaN, here and in its gradients.
        logits = logits.view(len(logits), H, T, -1).masked_fill(~mask[:, None], torch.finfo(logits.dtype).min)
        seen = mask.any(-1)[:, :, None, None]
    v = torch.cat((far.v, near.v), 1).transpose(1, 2)
    o = logits.softmax(-1).to(v.dtype).view(R, G, H // G * T, -1) @ v
    o = o.view(R, H, T, -1).transpose(1, 2)
    return o if seen is None else o.masked_fill(~seen, 0.0)
