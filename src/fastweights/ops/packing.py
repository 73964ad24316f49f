"""What the backends in plain PyTorch share: dtypes around a run, and packed sequences cut, run and joined.

Notation
    cu_seqlens   [0, n_1, n_1 + n_2, ...]: where each of N sequences packed into one row starts and ends
    N            sequences; the batch dimension of the state (N = B without packing)
    f, z         log decays of the key side and the value side
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .checks import compute_dtype, sequence_bounds

if TYPE_CHECKING:
    from torch import Tensor

    Run = Callable[..., tuple[Tensor, Tensor]]
    """run(q, k, v, f, z, S, inclusive) -> (o, S)"""


def run_sequences(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    inclusive: bool,
) -> tuple[Tensor, Tensor]:
    """(o, final state) of `run` on the batch, or on each packed sequence by itself, in the dtype of the state."""
    dtype, N = compute_dtype(q, k, v), q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with torch.autocast(q.device.type, enabled=False):
        S = initial_state
        if S is None:
            S = torch.zeros(N, *k.shape[2:], v.shape[3], dtype=dtype, device=q.device)
        tokens = [x if x is None else x.to(dtype) for x in (q.to(dtype) * scale, k, v, f, z)]
        if cu_seqlens is None:
            o, S = run(*tokens, S, inclusive)
            return o.to(v.dtype), S
        outputs, states = [], []
        for n, (start, end) in enumerate(sequence_bounds(cu_seqlens, q.shape[1])):
            part = [x if x is None else x[:, start:end] for x in tokens]
            o, state = run(*part, S[n : n + 1], inclusive)
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, dim=1).to(v.dtype), torch.cat(states)
