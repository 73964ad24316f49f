"""Window attention of many tokens on CPUs: by torch's flash attention, without logits, and with gradients of its own.

It gives what `window.py` gives. The sinks are added by the log-sum-exp of the window, of which torch's flash attention
has no derivative; so the backward pass is written out. It makes logits and weights anew, for some blocks at a time:
those of the window are exp(q·k - the log-sum-exp of both parts), and what the softmax takes off all derivatives is
one number for both parts, the sum of all weights times their derivatives.

Notation: B batch, T queries, L keys (those of the T tokens and of at most W - 1 before), W window, S sinks, C queries
of a block, N blocks, H query heads, G key/value heads, R heads that share a key, D width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from fastweights.layers.linear import needs_derivatives
from fastweights.ops.window import Sums, softmax_backward_

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int

    from fastweights.layers.window import Sinks

_LEAST, _MOST = 32, 128
"""Queries of a block, which sees W + C keys: half of them are of no use where C is W."""
_AT_ONCE = 1_500_000
"""Logits that the backward pass makes at once, or those of one block."""
_WHOLE = 16
"""Of which the keys of a block in the backward pass are a multiple."""


def is_for_flash(
    q: Float[Tensor, "B T H D"], k: Float[Tensor, "B L G D"], v: Float[Tensor, "B L G V"], sinks: Sinks | None
) -> bool:
    """Whether this can do it: on a CPU, for one document a row.

    Args:
        q: queries.
        k: keys.
        v: values.
        sinks: what queries see besides.
    """
    return (
        q.is_cpu
        and q.shape[1] > 1
        and q.shape[3] == v.shape[3]
        and (sinks is None or sinks.k.shape[1] == 1)
        and {_computed(x) for x in (q, k, v, *(sinks or ()))} in ({torch.float32}, {torch.bfloat16})
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _computed(x: Tensor) -> torch.dtype:
    """In which dtype products are made of it, under autocast, too."""
    is_cast = torch.is_autocast_enabled("cpu") and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return torch.get_autocast_dtype("cpu") if is_cast else x.dtype


def flash_window(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B L G D"],
    v: Float[Tensor, "B L G D"],
    *,
    window: int,
    scale: float,
    index: Int[Tensor, "_ T"],
    sinks: Sinks | None,
    plainly: Callable[..., Tensor],
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
        plainly: the same by operations of torch, for derivatives of derivatives.
    """
    tensors = [x.to(_computed(x)) for x in (q, k, v, *(sinks or ()))]
    how = _How(window, scale, plainly)
    if needs_derivatives(*tensors):
        return _FlashWindow.apply(how, index, *tensors)
    with torch.autocast("cpu", enabled=False):
        return _forward(how, index, _Seen.of(*tensors)).o


class _How(NamedTuple):
    window: int
    scale: float
    plainly: Callable[..., Tensor]


class _Far(NamedTuple):
    """Sinks of one document."""

    q: Float[Tensor, "B T H D"]
    k: Float[Tensor, "B S G D"]
    v: Float[Tensor, "B S G D"]


class _Seen(NamedTuple):
    """Queries, and all that they see."""

    q: Float[Tensor, "B T H D"]
    k: Float[Tensor, "B L G D"]
    v: Float[Tensor, "B L G D"]
    far: _Far | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> _Seen:
        """Sinks as `Sinks` has them."""
        return cls(q, k, v, _Far(sinks[0], sinks[1][:, 0], sinks[2][:, 0]) if sinks else None)


class _Blocks(NamedTuple):
    """How queries are cut into blocks, each with keys that overlap its neighbour's."""

    size: int
    """C."""
    reach: int
    """Keys of a block before its own."""
    front: int
    """Rows of zeros before the first key."""
    back: int
    """And after the last."""

    @classmethod
    def of(cls, T: int, L: int, window: int) -> _Blocks:
        reach = min(window, L + -L % _LEAST)  # where the text is shorter than the window
        size = max(_LEAST, min(_MOST, reach // 2, T + -T % _LEAST))
        return cls(size, reach, reach - (L - T), -T % size)

    def whole(self) -> _Blocks:
        """With some more keys, so that they are a multiple."""
        more = -(self.reach + self.size) % _WHOLE
        return self._replace(reach=self.reach + more, front=self.front + more)

    def queries(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, H, ...) to (B, N, G, R, C, ...)."""
        x = torch.cat((x, x.new_zeros(len(x), self.back, *x.shape[2:])), 1) if self.back else x
        x = x.unflatten(1, (-1, self.size)).unflatten(3, (heads, -1))
        return x.movedim(2, 4)

    def tokens(self, x: Tensor, T: int) -> Tensor:
        """Back: (B, N, G, R, C, ...) to (B, T, H, ...)."""
        return x.movedim(4, 2).flatten(3, 4).flatten(1, 2)[:, :T]

    def keys(self, x: Float[Tensor, "B L G D"]) -> Float[Tensor, "B N G keys D"]:
        """Of each block, where they are."""
        x = pad(x, (0, 0, 0, 0, self.front, self.back))
        row, length, heads, width = x.stride()
        shape = (len(x), (x.shape[1] - self.reach) // self.size, x.shape[2], self.reach + self.size, x.shape[3])
        return x.as_strided(shape, (row, self.size * length, heads, length, width), x.storage_offset())

    def index(self, index: Int[Tensor, "_ T"], value: int) -> Int[Tensor, "_ N C"]:
        """Of queries, `value` behind the last."""
        return pad(index, (0, self.back), value=value).unflatten(1, (-1, self.size))


class _Read(NamedTuple):
    """What queries have seen."""

    o: Float[Tensor, "B T H D"]
    log_sums: Float[Tensor, "B T H"]
    """Of the weights in the window."""
    all_log_sums: Float[Tensor, "B T H"]
    """Of all, sinks included."""


def _forward(how: _How, index: Int[Tensor, "_ T"], seen: _Seen) -> _Read:
    q, k, v, far = seen
    (B, T, H, _), (L, G) = q.shape, k.shape[1:3]
    blocks = _Blocks.of(T, L, how.window)
    q = q if q.stride(3) == 1 else q.contiguous()  # torch's kernel takes it for granted; padding makes k and v so
    near_q = blocks.queries(q, G).flatten(3, 4)
    near_k, near_v = blocks.keys(k), blocks.keys(v)
    after = blocks.index(index, blocks.reach)  # what these see is cut off
    added = _added(after, blocks.reach, H // G, q.dtype)
    rows = [_flash(near_q[b], near_k[b], near_v[b], added[b if len(added) > 1 else 0], how.scale) for b in range(B)]
    o, log_sums = (torch.stack(x).unflatten(3, (-1, blocks.size)) for x in zip(*rows, strict=True))
    o, log_sums = blocks.tokens(o, T), blocks.tokens(log_sums, T)
    all_log_sums = log_sums
    if far is not None:
        logits = _far_logits(far, index, how)
        far_o = _by_token(logits.softmax(-1).to(o.dtype) @ far.v.transpose(1, 2), T)
        far_sums = _by_token(logits.logsumexp(-1), T)
        share = (log_sums - far_sums).sigmoid()[..., None].to(o.dtype)
        o, all_log_sums = far_o + (o - far_o) * share, torch.logaddexp(log_sums, far_sums)
    if not bool((index >= 0).all()):
        o = o.masked_fill((index < 0)[:, :, None, None], 0.0)
    return _Read(o, log_sums, all_log_sums)


def _added(index: Int[Tensor, "_ N C"], reach: int, heads: int, dtype: torch.dtype) -> Float[Tensor, "_ n 1 RC keys"]:
    """0 where a query sees a key, -inf elsewhere; for all blocks at once (n = 1) if they are alike."""
    size = index.shape[2]
    query, key = torch.arange(size)[:, None], torch.arange(reach + size)
    distance = query + reach - key
    if bool((index >= reach - 1).all()):
        index = index[:1, :1]
    seen = (distance >= 0) & (distance <= index[..., None].clamp(max=reach - 1))
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return added.repeat(1, 1, heads, 1)[:, :, None]


def _flash(
    q: Float[Tensor, "N G RC D"],
    k: Float[Tensor, "N G keys D"],
    v: Float[Tensor, "N G keys D"],
    added: Float[Tensor, "n 1 RC keys"],
    scale: float,
) -> tuple[Float[Tensor, "N G RC D"], Float[Tensor, "N G RC"]]:
    """What a block sees, and the logarithm of the sum of its weights."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return attend(q, k, v, 0.0, False, attn_mask=added, scale=scale)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, T, H, ...) to (B, G, TR, ...): the heads of a group are more queries of what they share."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(2, 3)


def _by_token(x: Tensor, T: int) -> Tensor:
    """Back: (B, G, TR, ...) to (B, T, H, ...)."""
    return x.unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3)


def _far_logits(far: _Far, index: Int[Tensor, "_ T"], how: _How) -> Float[Tensor, "B G TR S"]:
    """Of sinks, in float32; the least number where one is in the window still."""
    S, G = far.k.shape[1:3]
    logits = (_by_head(far.q, G) @ far.k.permute(0, 2, 3, 1)).float() * how.scale
    gone = index[:, :, None] - torch.arange(S, device=index.device) >= how.window
    # Not -inf, of which a softmax makes NaN where no sink has left the window yet.
    by_query = logits.unflatten(2, (index.shape[1], -1))
    return by_query.masked_fill_(~gone[:, None, :, None], torch.finfo(torch.float32).min).flatten(2, 3)


class _FlashWindow(torch.autograd.Function):
    """The forward pass without logits, and the backward pass with some blocks' at a time."""

    @staticmethod
    def forward(ctx, how: _How, index: Tensor, *tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            read = _forward(how, index, _Seen.of(*tensors))
        ctx.save_for_backward(index, *read[1:], *tensors)
        ctx.how = how
        return read.o

    @staticmethod
    def backward(ctx, do: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        index, log_sums, all_log_sums, *tensors = (
            ctx.saved_tensors
        )  # once: gradient checkpointing refuses a second time
        if torch.is_grad_enabled():
            return None, None, *_differentiable(ctx.how, index, tensors, do)
        with torch.autocast("cpu", enabled=False):
            return None, None, *_backward(ctx.how, index, _Seen.of(*tensors), log_sums, all_log_sums, do)


def _differentiable(how: _How, index: Tensor, tensors: list[Tensor], do: Tensor) -> list[Tensor | None]:
    """Derivatives that have derivatives."""
    needed = [x for x in tensors if x.requires_grad]
    o = how.plainly(*tensors[:3], how.window, how.scale, index, *tensors[3:])
    found = iter(torch.autograd.grad(o, needed, do, create_graph=True))
    return [next(found) if x.requires_grad else None for x in tensors]


def _backward(
    how: _How,
    index: Int[Tensor, "_ T"],
    seen: _Seen,
    log_sums: Float[Tensor, "B T H"],
    all_log_sums: Float[Tensor, "B T H"],
    do: Float[Tensor, "B T H D"],
) -> tuple[Tensor, ...]:
    """Derivatives of all that is seen, in the order of `_Seen.of`."""
    (B, T), far = do.shape[:2], seen.far
    index = index.expand(B, T)
    blind = (index < 0)[:, :, None]
    if bool(blind.any()):
        do, all_log_sums = do.masked_fill(blind[..., None], 0.0), all_log_sums.masked_fill(blind, 0.0)
    do, share = do.to(seen.q.dtype), (log_sums - all_log_sums).exp()
    if far is None:
        *near, _ = _near_backward(how, index, seen, _Sums(log_sums, share, torch.zeros_like(log_sums)), do)
        return tuple(near)
    part = _FarPart.of(how, index, far, all_log_sums, do)
    *near, product = _near_backward(how, index, seen, _Sums(log_sums, share, part.product(T)), do)
    return *near, *part.backward(product, how.scale)


class _Sums(NamedTuple):
    """`Sums` of tokens."""

    logarithm: Float[Tensor, "B T H"]
    share: Float[Tensor, "B T H"]
    product: Float[Tensor, "B T H"]


def _near_backward(
    how: _How, index: Int[Tensor, "B T"], seen: _Seen, sums: _Sums, do: Float[Tensor, "B T H D"]
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "B T H"]]:
    """dq, dk and dv of the window, and for each query the sum of all weights times their derivatives."""
    q, k, v = seen[:3]
    (B, T, H, D), (L, G) = q.shape, k.shape[1:3]
    blocks = _Blocks.of(T, L, how.window).whole()
    queries, outputs = (blocks.queries(x, G) for x in (q, do))
    of_blocks = _Sums(*(blocks.queries(x.float(), G).contiguous() for x in sums))
    keys, values = blocks.keys(k), blocks.keys(v)
    places = blocks.index(index, -1).contiguous()
    N, C, reach = queries.shape[1], blocks.size, keys.shape[3]
    dq = torch.empty(queries.shape, dtype=q.dtype)
    # Behind the last block's keys there is room for a whole block, as they are added C at a time.
    dk, dv = (torch.zeros(B, G, blocks.front + L + blocks.back + C, D, dtype=torch.float32) for _ in range(2))
    together = max(1, _AT_ONCE // (H * C * reach))
    for b in range(B):
        for first in range(0, N, together):
            some = slice(first, first + together)
            part_q, part_do = (x[b, some].reshape(-1, H // G * C, D) for x in (queries, outputs))
            part_k, part_v = (x[b, some].reshape(-1, reach, D) for x in (keys, values))
            weights, derivatives = part_q @ part_k.mT, part_do @ part_v.mT
            of_some = Sums(*(x[b, some].view(len(part_q), -1) for x in of_blocks))
            softmax_backward_(
                weights, derivatives, of_some, places[b, some], heads=G, window=how.window, scale=how.scale
            )
            dq[b, some] = (derivatives @ part_k).view(-1, G, H // G, C, D)
            parts = (derivatives.mT @ part_q, weights.mT @ part_do)
            for whole, part in zip((dk, dv), parts, strict=True):
                _add_overlapping(whole[b], part.view(-1, G, reach, D), first, C)
    dk, dv = (x[:, :, blocks.front : blocks.front + L].transpose(1, 2).to(k.dtype) for x in (dk, dv))
    return blocks.tokens(dq, T), dk, dv, blocks.tokens(of_blocks.product, T)


def _add_overlapping(
    whole: Float[Tensor, "G rows D"], of_blocks: Float[Tensor, "n G keys D"], first: int, size: int
) -> None:
    """Add what each block has of its keys, those of the next block beginning C later, from the `first` block on."""
    n, _, keys, _ = of_blocks.shape
    for start in range(0, keys, size):
        part = of_blocks[:, :, start : start + size].transpose(0, 1)
        rows = whole[:, first * size + start :][:, : n * size].unflatten(1, (n, size))
        rows[:, :, : part.shape[2]] += part


class _FarPart(NamedTuple):
    """Of the backward pass what concerns the sinks."""

    q: Float[Tensor, "B G TR D"]
    do: Float[Tensor, "B G TR D"]
    k: Float[Tensor, "B G S D"]
    weights: Float[Tensor, "B G TR S"]
    derivatives: Float[Tensor, "B G TR S"]
    """Of the weights."""

    @classmethod
    def of(cls, how: _How, index: Tensor, far: _Far, log_sums: Float[Tensor, "B T H"], do: Tensor) -> _FarPart:
        """`log_sums` are those of all weights."""
        G = far.k.shape[2]
        weights = (_far_logits(far, index, how) - _by_head(log_sums, G)[..., None]).exp_()
        do = _by_head(do, G)
        derivatives = (do @ far.v.permute(0, 2, 3, 1)).float()
        return cls(_by_head(far.q, G), do, far.k.transpose(1, 2), weights, derivatives)

    def product(self, T: int) -> Float[Tensor, "B T H"]:
        """Of each query's weights and their derivatives."""
        return _by_token((self.weights * self.derivatives).sum(-1), T)

    def backward(self, product: Float[Tensor, "B T H"], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives of queries, keys and values, as `Sinks` has them; `product` is that for all keys."""
        less = _by_head(product, self.k.shape[1])[..., None]
        of_logits = ((self.derivatives - less) * self.weights * scale).to(self.q.dtype)
        dk, dv = of_logits.mT @ self.q, self.weights.to(self.q.dtype).mT @ self.do
        dq = _by_token(of_logits @ self.k, product.shape[1])
        return dq, dk.transpose(1, 2)[:, None], dv.transpose(1, 2)[:, None]
