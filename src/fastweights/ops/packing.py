"""What the backends in plain PyTorch share: dtypes around a run, and packed sequences cut, run and joined.

Notation
    cu_seqlens   [0, n_1, n_1 + n_2, ...]: where each of N sequences packed into one row starts and ends
    N            sequences; the batch dimension of the state (N = B without packing)
    S            state (N, G, K, V)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .checks import compute_dtype, sequence_bounds

if TYPE_CHECKING:
    from torch import Tensor

    Run = Callable[..., tuple[Tensor, Tensor]]
    """run(q, k, v, *gates, S) -> (o, S)"""


def run_sequences(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor | None],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o, final state) of `run` on the batch, or on each packed sequence by itself, in the dtype of the state.

    `gates` are what else a rule has per token, (B, T, ...), or None.
    """
    dtype, N = compute_dtype(q, k, v), q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with torch.autocast(q.device.type, enabled=False):
        S = initial_state
        if S is None:
            S = torch.zeros(N, *k.shape[2:], v.shape[3], dtype=dtype, device=q.device)
        tokens = [x if x is None else x.to(dtype) for x in (q.to(dtype) * scale, k, v, *gates)]
        if cu_seqlens is None:
            o, S = run(*tokens, S)
            return o.to(v.dtype), S
        outputs, states = [], []
        for n, (start, end) in enumerate(sequence_bounds(cu_seqlens, q.shape[1])):
            part = [x if x is None else x[:, start:end] for x in tokens]
            o, state = run(*part, S[n : n + 1])
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, dim=1).to(v.dtype), torch.cat(states)
