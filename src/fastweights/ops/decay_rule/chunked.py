"""The decay rule in plain PyTorch: parallel inside chunks, sequential between them, on any device.

Notation
    B, T     batch, time
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width
    L, n, c  tokens in a chunk, sub-chunks in a chunk, tokens in a sub-chunk (L = n * c)
    X        width of a gate: K, V, or 1 for one gate per head
    S        state (B, G, K, V) at the start of the chunk

With b_t the running sum of log f and a_t that of log z, the output of token t is

    o_t = e^{a_t} * S^T (e^{b_t} * q_t) + sum_{i <= t} (q_t * e^{b_t - b_i} . k_i) (e^{a_t - a_i} * v_i)

Factors such as e^{-b_i} overflow under strong decay, and b_t - b_i cancels even where it does not.
So every exponent below is a sum of log gates over exactly the steps in between: never positive,
never a difference of two running sums, and right for a log gate of -inf. Between sub-chunks it is
cut in two at the boundary before the query's sub-chunk; both parts look only at tokens up to t, so
no future leaks into the rounding. Inside a sub-chunk it is written out per pair of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

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
    scalar = all(gate is None or gate.shape[-1] == 1 for gate in (key_log_decay, value_log_decay))
    run = run_scalar if scalar else _run
    return run_sequences(run, q, k, v, key_log_decay, value_log_decay, initial_state, cu_seqlens, scale, inclusive)


def _run(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, z: Tensor | None, S: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    T, G = k.shape[1:3]
    q = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # (B, G, R, T, K)
    k, v, f, z = _each(lambda x: x.transpose(1, 2), k, v, f, z)  # (B, G, T, .)
    outputs = []
    if not inclusive:
        # Reading before token t is reading after token t - 1 with q_t.
        outputs.append(q[..., :1, :] @ S[:, :, None])
        q = F.pad(q[..., 1:, :], (0, 0, 0, min(T, 1)))
    # Zero keys, values and log gates leave the state as it is.
    q, k, v, f, z = _each(lambda x: F.pad(x, (0, 0, 0, -T % SUB_CHUNK)), q, k, v, f, z)

    recompute = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, f, z, S))
    for start in range(0, T, CHUNK):
        tokens = _each(lambda x, start=start: x[..., start : start + CHUNK, :], q, k, v, f, z)
        if recompute:
            o, S = checkpoint(_chunk, *tokens, S, use_reentrant=False, preserve_rng_state=False)
        else:
            o, S = _chunk(*tokens, S)  # pyright: ignore[reportCallIssue]
        outputs.append(o)
    o = torch.cat(outputs, dim=-2) if outputs else v.new_zeros(*q.shape[:4], v.shape[-1])
    return o[..., :T, :].permute(0, 3, 1, 2, 4).flatten(2, 3), S


def _each(function: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> Any:
    return [x if x is None else function(x) for x in tensors]


def _chunk(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, z: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk: q (B, G, R, L, K), k (B, G, L, K), v (B, G, L, V), gates (B, G, L, X) -> o (B, G, R, L, V), S."""
    o = _from_state(q, f, z, S) + _inside_sub_chunks(q, k, v, f, z)
    k, v = _at_boundaries(k, f), _at_boundaries(v, z)  # (B, G, n, L, .)
    S = k[:, :, -1].transpose(-1, -2) @ v[:, :, -1] + _decayed_over_chunk(S, f, z)
    if k.shape[2] > 1:
        o = o + F.pad(_between_sub_chunks(q, k[:, :, :-1], v[:, :, :-1], f, z), (0, 0, SUB_CHUNK, 0))
    return o, S


def _from_state(q: Tensor, f: Tensor | None, z: Tensor | None, S: Tensor) -> Tensor:
    if f is not None:
        q = q * f.cumsum(-2).exp()[:, :, None]
    o = (q.flatten(2, 3) @ S).unflatten(2, q.shape[2:4])
    return o if z is None else o * z.cumsum(-2).exp()[:, :, None]


def _decayed_over_chunk(S: Tensor, f: Tensor | None, z: Tensor | None) -> Tensor:
    if f is not None:
        S = f.sum(-2).exp()[..., :, None] * S
    if z is not None:
        S = z.sum(-2).exp()[..., None, :] * S
    return S


def _inside_sub_chunks(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, z: Tensor | None) -> Tensor:
    """Tokens that read keys and values of their own sub-chunk."""
    q, k, v = (x.unflatten(-2, (-1, SUB_CHUNK)) for x in (q, k, v))
    future = torch.ones(SUB_CHUNK, SUB_CHUNK, dtype=torch.bool, device=q.device).triu(1)  # (t, i): i > t
    if f is None:
        A = torch.einsum("bgrntk,bgnik->bgrnti", q, k)
    elif f.shape[-1] == 1:
        A = torch.einsum("bgrntk,bgnik->bgrnti", q, k) * _between_pairs(f)[:, :, None, ..., 0]
    else:
        A = torch.einsum("bgrntk,bgntik->bgrnti", q, _between_pairs(f) * k[..., None, :, :])
    A = A.masked_fill(future, 0.0)
    if z is None:
        o = torch.einsum("bgrnti,bgniv->bgrntv", A, v)
    elif z.shape[-1] == 1:
        o = torch.einsum("bgrnti,bgniv->bgrntv", A * _between_pairs(z)[:, :, None, ..., 0], v)
    else:
        o = torch.einsum("bgrnti,bgntiv->bgrntv", A, _between_pairs(z) * v[..., None, :, :])
    return o.flatten(3, 4)


def _between_sub_chunks(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, z: Tensor | None) -> Tensor:
    """Sub-chunks 2 to n read the chunk's earlier tokens; k, v (B, G, n - 1, L, .) are decayed to each boundary."""
    q = q.unflatten(-2, (-1, SUB_CHUNK))[:, :, :, 1:]
    if f is not None:
        q = q * _from_boundary(f)
    A = torch.einsum("bgrntk,bgnik->bgrnti", q, k)
    o = torch.einsum("bgrnti,bgniv->bgrntv", A, v)
    if z is not None:
        o = o * _from_boundary(z)
    return o.flatten(3, 4)


def _between_pairs(gate: Tensor) -> Tensor:
    """Decay from token i to token t of a sub-chunk: (B, G, L, X) -> (B, G, n, t, i, X); 1 where i >= t."""
    return between_pairs(gate.unflatten(-2, (-1, SUB_CHUNK)))


def _from_boundary(gate: Tensor) -> Tensor:
    """Decay from each sub-chunk's start to its token t, without the first: (B, G, L, X) -> (B, G, 1, n - 1, c, X)."""
    return gate.unflatten(-2, (-1, SUB_CHUNK))[:, :, None, 1:].cumsum(-2).exp()


def _at_boundaries(x: Tensor, gate: Tensor | None) -> Tensor:
    """Keys or values decayed from their token to the end of each sub-chunk; 0 for later tokens.

    (B, G, L, D) -> (B, G, n, L, D)
    """
    L = x.shape[-2]
    token = torch.arange(L, device=x.device)
    end = torch.arange(SUB_CHUNK, L + 1, SUB_CHUNK, device=x.device)
    inside = (token < end[:, None])[..., None]  # (n, L, 1)
    if gate is None:
        return torch.where(inside, x[:, :, None], 0.0)
    steps = torch.where(inside, gate[:, :, None], 0.0)
    after = F.pad(steps[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    return torch.where(inside, x[:, :, None] * after.exp(), 0.0)
