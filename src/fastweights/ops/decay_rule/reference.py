"""The decay rule step by step: slow, plain, and the definition that every other backend must match.

Notation
    B, T     batch, time
    G, R     key/value heads, query heads per key/value head (H = G * R)
    K, V     key and value width
    S        state (B, G, K, V)
    f, z     key-side and value-side gates, in [0, 1]; log_f, log_z their logs

    S_t = (f_t z_t^T) * S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t          inclusive: read after the write
    o_t = scale * S_{t-1}^T q_t      exclusive: read before the write and before the decay of step t

The paper (H. H. Mao, 2022) writes the transpose of this state, (V, K).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ..packing import run_sequences

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def decay_rule_reference(
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
    """Run the rule one token at a time under plain autograd; memory grows with T * K * V."""
    run = partial(_run, inclusive=inclusive)
    return run_sequences(run, q, k, v, (key_log_decay, value_log_decay), initial_state, cu_seqlens, scale)


def _run(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, log_z: Tensor | None, S: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    B, T, G, _ = k.shape
    q = q.unflatten(2, (G, -1))  # (B, T, G, R, K)
    outputs = []
    for t in range(T):
        if not inclusive:
            outputs.append(_read(q[:, t], S))
        if log_f is not None:
            S = log_f[:, t].exp()[..., :, None] * S
        if log_z is not None:
            S = log_z[:, t].exp()[..., None, :] * S
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        if inclusive:
            outputs.append(_read(q[:, t], S))
    if not outputs:
        return q.new_zeros(B, 0, q.shape[2] * q.shape[3], v.shape[3]), S
    return torch.stack(outputs, dim=1).flatten(2, 3), S


def _read(q: Tensor, S: Tensor) -> Tensor:
    return torch.einsum("bgrk,bgkv->bgrv", q, S)
