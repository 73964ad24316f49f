"""The delta rule on GPUs: chunks by plain products, and what goes from one to the next by Triton kernels.

What a chunk's tokens do to each other (`inside_chunks` of chunked.py) is a few products of all chunks at once, for
which PyTorch is as fast as any kernel. What is left is a loop over chunks, thousands of launches in PyTorch: here it is
one kernel, and one for its gradients. A decoding step is a kernel of its own.

Works under torch.compile, autocast and gradient checkpointing, for float32, bfloat16 and float16 inputs; state and sums
are float32. Nothing waits for the GPU. Under TRITON_INTERPRET=1, set before the first call, the kernels run on a CPU,
slowly: for tests.

Notation
    N        sequences: B, or those packed into one row by cu_seqlens
    n, M, L  chunks of a row, chunks of all packed sequences, tokens in a chunk
    G, R     key/value heads, query heads per key/value head
    W, E, c  k_erased, k_end and kept of chunked.py
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import compute_dtype, needs_gradients
from ..triton.calls import Chunks, check_gpu, chunks_of, empty_outputs, or_zeros, side
from .chunked import in_chunks, inside_chunks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WIDEST = 256
"""Width of the keys up to which a state's columns stay in registers."""
_MOST_READERS = 16
"""Query heads to a key/value head up to which the kernel for one token is taken."""
_LAUNCH = {"num_warps": 2, "num_stages": 1}
"""Two warps: gpu_kernels.py. One stage: wide keys would not find room in shared memory but on the largest cards."""


def delta_rule_gpu(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    beta: Float[Tensor, "B T G 1"],
    log_decay: Float[Tensor, "B T G 1"] | None,
    initial_state: Float[Tensor, "N G K V"] | None,
    cu_seqlens: Int[Tensor, " bounds"] | None,
    scale: float,
    inclusive: bool,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N G K V"]]:
    """Run the rule chunk by chunk; for the backward pass it keeps its inputs alone."""
    check_gpu(q, compute_dtype(q, k, v))
    if k.shape[3] > WIDEST:
        raise ValueError(
            f"backend='gpu' takes keys of up to {WIDEST} channels for the delta rule, but k has {k.shape[3]}; "
            "use backend='auto'"
        )
    tensors = (q, k, v, beta, log_decay, initial_state)
    recompute = needs_gradients(*tensors)
    if q.shape[1] == 1 and cu_seqlens is None and not recompute and q.shape[2] <= _MOST_READERS * k.shape[2]:
        return _step_op(*tensors, float(scale), inclusive)
    if not recompute:
        return _run(*tensors, cu_seqlens, float(scale), inclusive)
    run = partial(_run, cu_seqlens=cu_seqlens, scale=float(scale), inclusive=inclusive)
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def _kernels() -> Any:
    """The module of kernels, imported when they are needed: Triton need not be installed."""
    from . import gpu_kernels

    return gpu_kernels


def _gather(x: Float[Tensor, "1 T H D"], places: _Places) -> Float[Tensor, "1 H M L D"]:
    """Chunks of packed sequences; tokens that are not there are zeros."""
    chunks = F.pad(x[0].float(), (0, 0, 0, 0, 0, 1)).index_select(0, places.rows.flatten())
    return chunks.unflatten(0, places.rows.shape).permute(2, 0, 1, 3)[None]


def _scatter(chunks: Float[Tensor, "1 H M L D"], T: int, places: _Places) -> Float[Tensor, "1 T H D"]:
    """Back to tokens."""
    rows = chunks[0].permute(1, 2, 0, 3).flatten(0, 1)
    return rows.new_zeros(T + 1, *rows.shape[1:]).index_copy(0, places.rows.flatten(), rows)[None, :-1]


class _Places(NamedTuple):
    """Where the tokens of packed sequences are, and their chunks."""

    rows: Int[Tensor, "M L"]
    """The row of each token of a chunk; for one that is not there, one past the last."""
    chunks: Chunks


def _places(q: Float[Tensor, "1 T H K"], cu_seqlens: Int[Tensor, " bounds"], L: int) -> _Places:
    chunks, tokens = chunks_of(q, cu_seqlens, L), torch.arange(L, device=q.device)
    rows = chunks.starts[:, None] + tokens
    return _Places(torch.where(rows < chunks.ends[:, None], rows, q.shape[1]), chunks)


def _run(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    beta: Float[Tensor, "B T G 1"],
    log_decay: Float[Tensor, "B T G 1"] | None,
    initial_state: Float[Tensor, "N G K V"] | None,
    cu_seqlens: Int[Tensor, " bounds"] | None,
    scale: float,
    inclusive: bool,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N G K V"]]:
    o, final_state = empty_outputs(q, v, cu_seqlens)
    before = or_zeros(initial_state, final_state)
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    T, L = q.shape[1], 64 if q.shape[3] <= 128 else 32
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            cut, n = [in_chunks(x.float(), L) for x in (q, k, v, beta, log_decay)], -(-T // L)
            first, counts = torch.arange(len(q), device=q.device) * n, torch.full((len(q),), n, device=q.device)
        else:
            places = _places(q, cu_seqlens, L)
            cut, first, counts = [_gather(x, places) for x in (q, k, v, beta, log_decay)], *places.chunks[3:]
        queries, keys, values, strengths, decays = cut
        queries = queries.unflatten(1, (k.shape[2], -1)) * scale
        c = inside_chunks(queries, keys, values, strengths, decays, inclusive)
        tensors = (c.u_own, c.k_erased, c.k_end, c.kept)
        u, states, after = _scan_op(*tensors, before, first, counts)
        read = (c.weights @ u[:, :, None] + c.q_start @ states[:, :, None]).flatten(1, 2)  # (B, H, n, L, V)
        if cu_seqlens is None:
            return read.flatten(2, 3)[:, :, :T].transpose(1, 2).to(o.dtype), after
        return _scatter(read, T, places).to(o.dtype), after


def _layout(W: Tensor, N: int) -> tuple[int, int]:
    """Blocks between two sequences' first chunks, for each chunk between them, and between two heads."""
    B, G, n = W.shape[:3]
    return (G if B == N else 1), n


@torch.library.custom_op("fastweights::delta_rule_scan", mutates_args=())
def _scan_op(
    u_own: Tensor, W: Tensor, E: Tensor, c: Tensor, before: Tensor, first: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u and the states before chunks and after sequences, from what chunks do by themselves and the first states.

    Shapes are those of `Inside`; before (N, G, K, V), and `first` and `counts` of `Chunks`.
    """
    u_own, W, E, c, before = (x.contiguous() for x in (u_own, W, E, c, before))
    (B, G, n, L, K), V = W.shape, u_own.shape[-1]
    # What no sequence needs stays 0.
    u, states, after = torch.zeros_like(u_own), W.new_zeros(B, G, n, K, V), torch.empty_like(before)
    if before.numel():
        BV = side(V, 32)
        with torch.cuda.device_of(W):  # Triton launches on the current GPU
            _kernels().write[(len(before), G, -(-V // BV))](
                u_own, W, E, c, first, counts, before, u, states, after, G, *_layout(W, len(before)), K, V,
                L=L, BK=side(K, WIDEST), BV=BV, **_LAUNCH,
            )  # fmt: skip
    return u, states, after


@_scan_op.register_fake
def _(u_own, W, E, c, before, first, counts):
    states = W.new_empty((*W.shape[:3], W.shape[4], u_own.shape[4]))
    return u_own.new_empty(u_own.shape), states, before.new_empty(before.shape)


@torch.library.custom_op("fastweights::delta_rule_scan_backward", mutates_args=())
def _scan_back_op(
    du_read: Tensor,
    dstates_read: Tensor,
    dafter: Tensor,
    W: Tensor,
    E: Tensor,
    c: Tensor,
    first: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, of the state after each chunk, and of the state before each sequence."""
    du_read, dstates_read, dafter, W, E, c = (x.contiguous() for x in (du_read, dstates_read, dafter, W, E, c))
    (_, G, _, L, K), V = W.shape, du_read.shape[-1]
    du, dS_after, dbefore = torch.zeros_like(du_read), torch.zeros_like(dstates_read), torch.empty_like(dafter)
    if dafter.numel():
        BV = side(V, 32)
        with torch.cuda.device_of(W):  # Triton launches on the current GPU
            _kernels().write_back[(len(dafter), G, -(-V // BV))](
                W, E, c, first, counts, dafter, du_read, dstates_read, du, dS_after, dbefore,
                G, *_layout(W, len(dafter)), K, V, L=L, BK=side(K, WIDEST), BV=BV, **_LAUNCH,
            )  # fmt: skip
    return du, dS_after, dbefore


@_scan_back_op.register_fake
def _(du_read, dstates_read, dafter, W, E, c, first, counts):
    return tuple(x.new_empty(x.shape) for x in (du_read, dstates_read, dafter))


def _setup_context(ctx, inputs, output) -> None:
    _, W, E, c, _, first, counts = inputs
    ctx.save_for_backward(W, E, c, first, counts, *output[:2])


def _backward(ctx, du_read, dstates_read, dafter):
    W, E, c, first, counts, u, states = ctx.saved_tensors
    du, dS_after, dbefore = _scan_back_op(du_read, dstates_read, dafter, W, E, c, first, counts)
    dc = (states * dS_after).sum((-2, -1), keepdim=True)
    return du, -du @ states.mT, u @ dS_after.mT, dc, dbefore, None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastweights::delta_rule_step", mutates_args=())
def _step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    inclusive: bool,
) -> tuple[Tensor, Tensor]:
    """(o, final state) of one token."""
    o, after = empty_outputs(q, v, None)
    (N, _, H, K), (G, V) = q.shape, v.shape[2:]
    decay, R, BV = beta if log_decay is None else log_decay, H // G, side(V, 32)
    strides = [x.stride(i) for x in (q, k, v) for i in (0, 2, 3)] + [x.stride(i) for x in (beta, decay) for i in (0, 2)]
    if after.numel():
        with torch.cuda.device_of(q):
            _kernels().step[(N, G, -(-V // BV))](
                q, k, v, beta, decay, or_zeros(initial_state, after), o, after, *strides, H, G, R, K, V, scale,
                DECAY=log_decay is not None, INCLUSIVE=inclusive, READERS=1 << (R - 1).bit_length(),
                BK=side(K, WIDEST), BV=BV, **_LAUNCH,
            )  # fmt: skip
    return o, after


@_step_op.register_fake
def _(q, k, v, beta, log_decay, initial_state, scale, inclusive):
    return empty_outputs(q, v, None)
