"""The delta rule step by step: slow, plain, and the definition that every other backend must match.

Notation
    B, T     batch, time
    G, R     key/value heads, query heads per key/value head (H = G * R)
    K, V     key and value width
    S        state (B, G, K, V)
    a        decay, in [0, 1]; log_a its log, (B, T, G, 1)
    b        writing strength, (B, T, G, 1)
    e        error (B, G, V): what the value is beyond what the state already gives for its key

    e_t = v_t - a_t S_{t-1}^T k_t
    S_t = a_t S_{t-1} + b_t k_t e_t^T
    o_t = scale * S_t^T q_t          inclusive: read after the write
    o_t = scale * S_{t-1}^T q_t      exclusive: read before the write and before the decay of step t
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ..packing import run_sequences

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def delta_rule_reference(
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
    """Run the rule one token at a time under plain autograd; memory grows with T * K * V."""
    run = partial(_run, inclusive=inclusive)
    return run_sequences(run, q, k, v, (beta, log_decay), initial_state, cu_seqlens, scale)


def _run(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, log_a: Tensor | None, S: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    B, T, G, _ = k.shape
    q = q.unflatten(2, (G, -1))  # (B, T, G, R, K)
    outputs = []
    for t in range(T):
        if not inclusive:
            outputs.append(q[:, t] @ S)
        if log_a is not None:
            S = log_a[:, t].exp()[..., None] * S
        e = v[:, t] - (k[:, t, :, None, :] @ S)[:, :, 0]
        S = S + k[:, t, :, :, None] * (b[:, t] * e)[:, :, None, :]
        if inclusive:
            outputs.append(q[:, t] @ S)
    if not outputs:
        return q.new_zeros(B, 0, q.shape[2] * q.shape[3], v.shape[3]), S
    return torch.stack(outputs, dim=1).flatten(2, 3), S
