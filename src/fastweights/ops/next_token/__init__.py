"""Losses over next tokens with their derivatives, on CPUs: each logit of a large vocabulary is read once.

By torch's functions, a step of distillation goes over the logits of both models some ten times; what they cost is going
over memory, not what they compute.

Notation: n rows, one a position; v tokens of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..numba.calls import address, call_kernel
from ..numba.runtime import load_kernels
from ..numba.scratch import guard_size

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

LEAST = 16
"""Tokens of a vocabulary, that fill a vector."""
_WORTH_A_THREAD = 50_000
"""Logits; fewer are done before another thread has woken up."""


def takes(logits: Tensor, truth: Tensor | None) -> bool:
    """Whether the kernel does: logits of float32 or bf16 on a CPU, both alike."""
    return (
        all(x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) for x in (logits, truth) if x is not None)
        and (truth is None or (truth.dtype == logits.dtype and truth.shape == logits.shape))
        and logits.shape[1] >= LEAST
        and not torch.compiler.is_compiling()
    )


def losses_and_derivatives(
    logits: Float[Tensor, "n v"],
    truth: Float[Tensor, "n v"] | None,
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    kl_weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n v"]]:
    """The sum of weight * cross-entropy + kl_weight * KL(truth || model) over rows, and the derivative of their mean.

    Args:
        logits: the model's, as `takes` wants them.
        truth: another model's; None for none, and no KL.
        labels: the token of each row, from 0 to v - 1, also where its weight is 0.
        weights: of the cross-entropies, float32.
        kl_weight: of the divergences.

    Raises:
        IndexError: a label is no token of the vocabulary.
    """
    n, v = logits.shape
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < v:
        raise IndexError(f"labels are from {int(labels.min())} to {int(labels.max())}; allowed are 0 to {v - 1}")
    logits, truth = logits.contiguous(), None if truth is None else truth.contiguous()
    labels, weights = labels.to(torch.int64).contiguous(), weights.float().contiguous()
    losses, derivatives = torch.empty(n, dtype=torch.float32), torch.empty_like(logits)
    kernels = load_kernels("next_token")
    problem = kernels.Problem(
        logits=logits.data_ptr(),
        truth=address(truth),
        labels=labels.data_ptr(),
        weights=weights.data_ptr(),
        n=n,
        v=v,
        short=int(logits.dtype == torch.bfloat16),
        guard=guard_size(),
    )
    results = kernels.Results(losses=losses.data_ptr(), derivatives=derivatives.data_ptr())
    threads = max(1, min(torch.get_num_threads(), logits.numel() // _WORTH_A_THREAD))
    sizes = kernels.buffer_sizes(v)
    call_kernel(kernels.losses_and_derivatives, problem, results, sizes, float(kl_weight), n, threads)
    return losses.sum(dtype=torch.float64).float(), derivatives
