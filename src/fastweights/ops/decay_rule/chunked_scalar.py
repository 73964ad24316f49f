"""The chunked form where each head has one gate a step, or none: three matrix products a chunk.

Notation
    B, T     batch, time
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width
    L        tokens in a chunk
    log_f, log_z   logs of the gates of both sides, (B, T, G, 1); log_fz their sum, as each gates the whole state
    D_ti     decay from token i to token t of a chunk, f_{i+1} z_{i+1} ... f_t z_t, as (B, G, t, i)
    S        state (B, G, K, V) at the start of the chunk

    o_t = f_1 z_1 ... f_t z_t S^T q_t + sum_{i <= t} D_ti (q_t . k_i) v_i            (inclusive)

One number per pair of tokens can be written out for a whole chunk, where gates as vectors need sub-chunks
(chunked.py). As there, every exponent is a sum of log gates over exactly the steps in between, so nothing overflows
or cancels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CHUNK = 64


def run_scalar(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, log_z: Tensor | None, S: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, K), k (B, T, G, K), v (B, T, G, V), log gates (B, T, G, 1) or None, S (B, G, K, V) -> o, S."""
    T, G = k.shape[1:3]
    q = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # (B, G, R, T, K)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, T, .)
    gates = [log_gate.transpose(1, 2) for log_gate in (log_f, log_z) if log_gate is not None]
    log_fz = sum(gates[1:], gates[0]) if gates else None
    outputs = []
    for start in range(0, T, CHUNK):
        tokens = (x if x is None else x[..., start : start + CHUNK, :] for x in (q, k, v, log_fz))
        o, S = _chunk(*tokens, S, inclusive)  # pyright: ignore[reportCallIssue]
        outputs.append(o)
    o = torch.cat(outputs, dim=-2) if outputs else v.new_zeros(*q.shape[:4], v.shape[-1])
    return o.permute(0, 3, 1, 2, 4).flatten(2, 3), S


def _chunk(
    q: Float[Tensor, "B G R L K"],
    k: Float[Tensor, "B G L K"],
    v: Float[Tensor, "B G L V"],
    log_fz: Float[Tensor, "B G L 1"] | None,
    S: Float[Tensor, "B G K V"],
    inclusive: bool,
) -> tuple[Float[Tensor, "B G R L V"], Float[Tensor, "B G K V"]]:
    L, R = q.shape[-2], q.shape[2]
    unseen = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1 if inclusive else 0)  # (t, i)
    A = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (R, L))
    q_start, k_end = q, k
    if log_fz is not None:
        D = between_pairs(log_fz)[..., 0]
        to_end, all_steps = D[..., -1, :], log_fz.sum(-2, keepdim=True).exp()
        since_start = log_fz.cumsum(-2)
        if not inclusive:
            # What token t reads has not yet seen the decay of step t.
            D = torch.nn.functional.pad(D[..., :-1, :], (0, 0, 1, 0))
            since_start = torch.nn.functional.pad(since_start[..., :-1, :], (0, 0, 1, 0))
        A = A * D[:, :, None]
        q_start = q * since_start.exp()[:, :, None]
        k_end = k * to_end[..., None]
        kept = S * all_steps
    else:
        kept = S
    A = A.masked_fill(unseen, 0.0)
    o = (A.flatten(2, 3) @ v + q_start.flatten(2, 3) @ S).unflatten(2, (R, L))
    return o, kept + k_end.transpose(-1, -2) @ v


def between_pairs(log_gate: Float[Tensor, "*B L X"]) -> Float[Tensor, "*B L L X"]:
    """Decay of the steps i + 1 ... t, (..., t, i, X); 1 where i >= t."""
    L = log_gate.shape[-2]
    earlier = torch.ones(L, L, dtype=torch.bool, device=log_gate.device).tril(-1)  # (t, i): i < t
    return torch.where(earlier[..., None], log_gate[..., :, None, :], 0.0).cumsum(-3).exp()
