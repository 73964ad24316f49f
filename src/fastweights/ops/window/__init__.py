"""The softmax of a window, differentiated on CPUs: what lies between the matrix products of its backward pass.

torch has no such pass for a softmax over a window and a few keys elsewhere, and its own for CPUs makes the products of
bf16 without the machine's instructions for them. Between torch's batched products (`layers/flash_window.py`) each logit
is read once here and each derivative written once, where a function of torch's for each step would go over all of them
nine times.

Notation
    N        blocks, each of C queries of R heads that share keys and values
    G        key/value heads
    keys     of a block, a multiple of 16: some before its queries, as many as the window at least, and then their own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..numba.calls import call_kernel
from ..numba.runtime import load_kernels
from ..numba.scratch import guard_size

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_WORTH_A_THREAD = 20_000
"""Logits; fewer are done before another thread has woken up."""


class Sums(NamedTuple):
    """What is known of each query's softmax, in float32 and contiguous."""

    logarithm: Float[Tensor, "NG RC"]
    """Of the sum of its weights in the window."""
    share: Float[Tensor, "NG RC"]
    """Of the window in all weights, those of keys elsewhere included."""
    product: Float[Tensor, "NG RC"]
    """Of weights and their derivatives, for keys elsewhere; becomes that for all."""


def softmax_backward_(
    logits: Float[Tensor, "NG RC keys"],
    derivatives: Float[Tensor, "NG RC keys"],
    sums: Sums,
    index: Int[Tensor, "N C"],
    *,
    heads: int,
    window: int,
    scale: float,
) -> None:
    """Turn q·k into weights of the softmax, and the weights' derivatives into those of q·k, in place.

    Both are float32 or bf16, and contiguous; what a query does not see becomes 0. Weights are made to add up to what
    they should, and what is taken off all derivatives is made of these very numbers, as products of bf16 are rounded:
    so the derivatives of a query add up to 0.

    Args:
        logits: q·k, before the scale.
        derivatives: of the weights.
        sums: of each query.
        index: of each query in its document, int64 and contiguous: it sees so many tokens before its own, if the window
            reaches as far; below 0 it sees nothing.
        heads: G.
        window: tokens that a query sees at most, its own included.
        scale: factor on q·k.
    """
    rows, queries, keys = logits.shape
    kernels = load_kernels("window")
    problem = kernels.Problem(
        logits=logits.data_ptr(),
        derivatives=derivatives.data_ptr(),
        logarithm=sums.logarithm.data_ptr(),
        share=sums.share.data_ptr(),
        product=sums.product.data_ptr(),
        index=index.data_ptr(),
        heads=heads,
        queries=queries,
        block=index.shape[1],
        keys=keys,
        window=window,
        short=int(logits.dtype == torch.bfloat16),
        guard=guard_size(),
    )
    threads = max(1, min(torch.get_num_threads(), logits.numel() // _WORTH_A_THREAD))
    sizes = kernels.buffer_sizes(keys)
    call_kernel(kernels.softmax_backward, problem, kernels.Results(0), sizes, scale, rows * queries, threads)
