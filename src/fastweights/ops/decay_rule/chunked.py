"""The decay rule in plain PyTorch: parallel inside chunks, sequential between them, on any device.

Notation
    B, T     batch, time
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width
    L, n, c  tokens in a chunk, sub-chunks in a chunk, tokens in a sub-chunk (L = n * c)
    f, z     key-side and value-side gates, in [0, 1]; log_f, log_z their logs
    X        width of a gate: K, V, or 1 for one gate per head
    S        state (B, G, K, V) at the start of the chunk

With the gates of the steps in between multiplied up, the output of token t of a chunk is

    o_t = (z_1 ... z_t) * S^T (f_1 ... f_t * q_t)
          + sum_{i <= t} (q_t * f_{i+1} ... f_t . k_i) (z_{i+1} ... z_t * v_i)

Each product is e to the sum of the log gates of exactly these steps: never positive, never a
difference of two running sums, which would cancel, and right for a log gate of -inf. Between
sub-chunks it is cut in two at the boundary before the query's sub-chunk; both parts look only at
tokens up to t, so no future leaks into the rounding. Inside a sub-chunk it is written out per pair
of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..checks import are_scalar, needs_gradients
from ..packing import run_sequences
from .chunked_scalar import between_pairs, run_scalar

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

CHUNK = 64
SUB_CHUNK = 16


def decay_rule_chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    key_log_decay: Float[Tensor, "B T G Kf"] | None,
    value_log_decay: Float[Tensor, "B T G Vz"] | None,
    initial_state: Float[Tensor, "N G K V"] | None,
    cu_seqlens: Int[Tensor, " bounds"] | None,
    scale: float,
    inclusive: bool,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N G K V"]]:
    """Run the rule chunk by chunk under plain autograd; with vector gates each chunk is recomputed going back."""
    run = partial(run_scalar if are_scalar(key_log_decay, value_log_decay) else _run, inclusive=inclusive)
    return run_sequences(run, q, k, v, (key_log_decay, value_log_decay), initial_state, cu_seqlens, scale)


def _run(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, log_z: Tensor | None, S: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    T, G = k.shape[1:3]
    q = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # (B, G, R, T, K)
    k, v, log_f, log_z = _each(lambda x: x.transpose(1, 2), k, v, log_f, log_z)  # (B, G, T, .)
    outputs = []
    if not inclusive:
        # Reading before token t is reading after token t - 1 with q_t.
        outputs.append(q[..., :1, :] @ S[:, :, None])
        q = F.pad(q[..., 1:, :], (0, 0, 0, min(T, 1)))
    # Zero keys, values and log gates leave the state as it is.
    q, k, v, log_f, log_z = _each(lambda x: F.pad(x, (0, 0, 0, -T % SUB_CHUNK)), q, k, v, log_f, log_z)

    recompute = needs_gradients(q, k, v, log_f, log_z, S)
    for start in range(0, T, CHUNK):
        tokens = _each(lambda x, start=start: x[..., start : start + CHUNK, :], q, k, v, log_f, log_z)
        if recompute:
            o, S = checkpoint(_chunk, *tokens, S, use_reentrant=False, preserve_rng_state=False)
        else:
            o, S = _chunk(*tokens, S)  # pyright: ignore[reportCallIssue]
        outputs.append(o)
    o = torch.cat(outputs, dim=-2) if outputs else v.new_zeros(*q.shape[:4], v.shape[-1])
    return o[..., :T, :].permute(0, 3, 1, 2, 4).flatten(2, 3), S


def _each(function: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> Any:
    return [x if x is None else function(x) for x in tensors]


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, log_z: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: q (B, G, R, L, K), k (B, G, L, K), v (B, G, L, V), log gates (B, G, L, X) -> o (B, G, R, L, V), S."""
    o = _from_state(q, log_f, log_z, S) + _inside_sub_chunks(q, k, v, log_f, log_z)
    k, v = _at_boundaries(k, log_f), _at_boundaries(v, log_z)  # (B, G, n, L, .)
    S = k[:, :, -1].transpose(-1, -2) @ v[:, :, -1] + _decayed_over_chunk(S, log_f, log_z)
    if k.shape[2] > 1:
        o = o + F.pad(_between_sub_chunks(q, k[:, :, :-1], v[:, :, :-1], log_f, log_z), (0, 0, SUB_CHUNK, 0))
    return o, S


def _from_state(q: Tensor, log_f: Tensor | None, log_z: Tensor | None, S: Tensor) -> Tensor:
    if log_f is not None:
        q = q * log_f.cumsum(-2).exp()[:, :, None]
    o = (q.flatten(2, 3) @ S).unflatten(2, q.shape[2:4])
    return o if log_z is None else o * log_z.cumsum(-2).exp()[:, :, None]


def _decayed_over_chunk(S: Tensor, log_f: Tensor | None, log_z: Tensor | None) -> Tensor:
    if log_f is not None:
        S = log_f.sum(-2).exp()[..., :, None] * S
    if log_z is not None:
        S = log_z.sum(-2).exp()[..., None, :] * S
    return S


def _inside_sub_chunks(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, log_z: Tensor | None) -> Tensor:
    """Tokens that read keys and values of their own sub-chunk."""
    q, k, v = (x.unflatten(-2, (-1, SUB_CHUNK)) for x in (q, k, v))
    future = torch.ones(SUB_CHUNK, SUB_CHUNK, dtype=torch.bool, device=q.device).triu(1)  # (t, i): i > t
    if log_f is None:
        A = torch.einsum("bgrntk,bgnik->bgrnti", q, k)
    elif log_f.shape[-1] == 1:
        A = torch.einsum("bgrntk,bgnik->bgrnti", q, k) * _between_pairs(log_f)[:, :, None, ..., 0]
    else:
        A = torch.einsum("bgrntk,bgntik->bgrnti", q, _between_pairs(log_f) * k[..., None, :, :])
    A = A.masked_fill(future, 0.0)
    if log_z is None:
        o = torch.einsum("bgrnti,bgniv->bgrntv", A, v)
    elif log_z.shape[-1] == 1:
        o = torch.einsum("bgrnti,bgniv->bgrntv", A * _between_pairs(log_z)[:, :, None, ..., 0], v)
    else:
        o = torch.einsum("bgrnti,bgntiv->bgrntv", A, _between_pairs(log_z) * v[..., None, :, :])
    return o.flatten(3, 4)


def _between_sub_chunks(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, log_z: Tensor | None) -> Tensor:
    """Sub-chunks 2 to n read the chunk's earlier tokens; k, v (B, G, n - 1, L, .) are decayed to each boundary."""
    q = q.unflatten(-2, (-1, SUB_CHUNK))[:, :, :, 1:]
    if log_f is not None:
        q = q * _from_boundary(log_f)
    A = torch.einsum("bgrntk,bgnik->bgrnti", q, k)
    o = torch.einsum("bgrnti,bgniv->bgrntv", A, v)
    if log_z is not None:
        o = o * _from_boundary(log_z)
    return o.flatten(3, 4)


def _between_pairs(log_gate: Tensor) -> Tensor:
    """Decay from token i to token t of a sub-chunk: (B, G, L, X) -> (B, G, n, t, i, X); 1 where i >= t."""
    return between_pairs(log_gate.unflatten(-2, (-1, SUB_CHUNK)))


def _from_boundary(log_gate: Tensor) -> Tensor:
    """Decay from each sub-chunk's start to its token t, without the first: (B, G, L, X) -> (B, G, 1, n - 1, c, X)."""
    return log_gate.unflatten(-2, (-1, SUB_CHUNK))[:, :, None, 1:].cumsum(-2).exp()


def _at_boundaries(x: Tensor, log_gate: Tensor | None) -> Tensor:
    """Keys or values decayed from their token to the end of each sub-chunk; 0 for later tokens.

    (B, G, L, D) -> (B, G, n, L, D)
    """
    L = x.shape[-2]
    token = torch.arange(L, device=x.device)
    end = torch.arange(SUB_CHUNK, L + 1, SUB_CHUNK, device=x.device)
    inside = (token < end[:, None])[..., None]  # (n, L, 1)
    if log_gate is None:
        return torch.where(inside, x[:, :, None], 0.0)
    steps = torch.where(inside, log_gate[:, :, None], 0.0)
    after = F.pad(steps[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    return torch.where(inside, x[:, :, None] * after.exp(), 0.0)
