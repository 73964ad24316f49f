"""The delta rule in plain PyTorch: parallel over chunks, but for the state that goes from one to the next; any device.

Notation
    B, T     batch, time
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width
    n, L     chunks, tokens in a chunk
    a, b     decay, in [0, 1], and writing strength; log_a the log of the former
    D_ti     decay from token i to token t of a chunk, a_{i+1} ... a_t; c_t that from the chunk's start, a_1 ... a_t
    S        state (B, G, K, V) at the start of the chunk
    u        what is written at each token, b_t e_t (reference.py)

With u known, outputs and the next state are sums over tokens, as in the decay rule. And u is known from

    u_t + b_t sum_{i < t} D_ti (k_t . k_i) u_i = b_t (v_t - c_t S^T k_t)

a unit lower triangular system M u = b (v - c k S), of which M^-1 b v and M^-1 b c k are found for all chunks at once
(the WY form: S. Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024,
arXiv 2406.06484; with decay, "Gated Delta Networks", 2024, arXiv 2412.06464).

Each product of decays is e to the sum of the logs of exactly these steps: never positive, never a difference of two
running sums, which would cancel, and right for a log of -inf.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ..decay_rule.chunked_scalar import between_pairs
from ..packing import run_sequences

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

CHUNK = 64


def delta_rule_chunked(
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
    """Run the rule chunk by chunk under plain autograd."""
    run = partial(_run, inclusive=inclusive)
    return run_sequences(run, q, k, v, (beta, log_decay), initial_state, cu_seqlens, scale)


def _run(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, log_a: Tensor | None, S: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    B, T, G, _ = k.shape
    R = q.shape[2] // G
    if T == 0:
        return v.new_zeros(B, 0, G * R, v.shape[3]), S
    L = min(CHUNK, T)
    q = in_chunks(q, L).unflatten(1, (G, R))  # (B, G, R, n, L, K)
    k, v, b = (in_chunks(x, L) for x in (k, v, b))  # (B, G, n, L, .)
    log_a = torch.zeros_like(b) if log_a is None else in_chunks(log_a, L)

    c = inside_chunks(q, k, v, b, log_a, inclusive)
    outputs = []
    for j in range(k.shape[2]):
        u = c.u_own[:, :, j] - c.k_erased[:, :, j] @ S
        outputs.append(c.weights[:, :, :, j] @ u[:, :, None] + c.q_start[:, :, :, j] @ S[:, :, None])
        S = c.kept[:, :, j] * S + c.k_end[:, :, j].transpose(-1, -2) @ u
    o = torch.cat(outputs, dim=-2)[..., :T, :]  # (B, G, R, T, V)
    return o.permute(0, 3, 1, 2, 4).flatten(2, 3), S


class Inside(NamedTuple):
    """What chunks do by themselves, whatever the state before them is.

    With that state S, u = u_own - k_erased S is what their tokens write, weights u + q_start S what they read, and
    kept S + k_end^T u the state after them.
    """

    u_own: Float[Tensor, "B G n L V"]
    k_erased: Float[Tensor, "B G n L K"]
    k_end: Float[Tensor, "B G n L K"]
    kept: Float[Tensor, "B G n 1 1"]
    weights: Float[Tensor, "B G R n L L"]
    q_start: Float[Tensor, "B G R n L K"]


def inside_chunks(
    q: Float[Tensor, "B G R n L K"],
    k: Float[Tensor, "B G n L K"],
    v: Float[Tensor, "B G n L V"],
    b: Float[Tensor, "B G n L 1"],
    log_a: Float[Tensor, "B G n L 1"],
    inclusive: bool,
) -> Inside:
    """All of it, for all chunks at once; a token with k, b and log_a of 0 is as if it were not there."""
    L = k.shape[-2]
    D, c = between_pairs(log_a)[..., 0], log_a.cumsum(-2).exp()  # (B, G, n, t, i), (B, G, n, L, 1)
    u_own, k_erased = _written(k, v, b, D, c)
    k_end, kept = k * D[..., -1, :, None], c[..., -1:, :]
    if not inclusive:
        # What token t reads has not yet seen the decay and the write of step t.
        D, c = F.pad(D[..., :-1, :], (0, 0, 1, 0)), F.pad(c[..., :-1, :], (0, 0, 1, 0), value=1.0)
    unseen = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1 if inclusive else 0)  # (t, i)
    weights = (q @ k[:, :, None].transpose(-1, -2) * D[:, :, None]).masked_fill(unseen, 0.0)
    return Inside(u_own, k_erased, k_end, kept, weights, q * c[:, :, None])


def in_chunks(x: Float[Tensor, "B T H D"], L: int) -> Float[Tensor, "B H n L D"]:
    """Cut into chunks; the last is filled up with zeros, which leave the state as it is."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % L))
    return x.unflatten(2, (-1, L))


def _written(
    k: Float[Tensor, "B G n L K"],
    v: Float[Tensor, "B G n L V"],
    b: Float[Tensor, "B G n L 1"],
    D: Float[Tensor, "B G n L L"],
    c: Float[Tensor, "B G n L 1"],
) -> tuple[Float[Tensor, "B G n L V"], Float[Tensor, "B G n L K"]]:
    """M^-1 b v and M^-1 b c k: what is written is the first less the second times S."""
    M = (b * D * (k @ k.transpose(-1, -2))).tril(-1)  # its diagonal of ones need not be there
    right = torch.cat([b * v, b * c * k], dim=-1)
    x = torch.linalg.solve_triangular(M, right, upper=False, unitriangular=True)
    u_own, k_erased = x.split([v.shape[-1], k.shape[-1]], dim=-1)
    return u_own, k_erased
