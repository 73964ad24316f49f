"""Recurrences on tensors. They know nothing of models: one door per rule, several backends behind it."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from .checks import LARGE, are_scalar, check_gate, check_inputs, check_per_head, compute_dtype, needs_gradients
from .decay_rule.chunked import decay_rule_chunked
from .decay_rule.cpu import decay_rule_cpu
from .decay_rule.gpu import decay_rule_gpu
from .decay_rule.reference import decay_rule_reference
from .delta_rule.chunked import delta_rule_chunked
from .delta_rule.cpu import delta_rule_cpu
from .delta_rule.gpu import WIDEST, delta_rule_gpu
from .delta_rule.reference import delta_rule_reference
from .triton.calls import suits_this_machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["decay_rule", "delta_rule"]

logger = logging.getLogger("fastweights")

_DECAY_RULE = {
    "reference": decay_rule_reference,
    "chunked": decay_rule_chunked,
    "cpu": decay_rule_cpu,
    "gpu": decay_rule_gpu,
}
_DELTA_RULE = {
    "reference": delta_rule_reference,
    "chunked": delta_rule_chunked,
    "cpu": delta_rule_cpu,
    "gpu": delta_rule_gpu,
}


def decay_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    key_log_decay: Float[Tensor, "B T G Kf"] | None = None,
    value_log_decay: Float[Tensor, "B T G Vz"] | None = None,
    *,
    scale: float = 1.0,
    initial_state: Float[Tensor, "N G K V"] | None = None,
    output_final_state: bool = False,
    inclusive: bool = True,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N G K V"] | None]:
    """Decaying fast weights: a state that fades by gates on both of its sides, and is read with q.

    With gates f = exp(key_log_decay) and z = exp(value_log_decay), from S_0 = initial_state or 0,

        S_t = (f_t z_t^T) * S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t          (inclusive)
        o_t = scale * S_{t-1}^T q_t      (not inclusive: before the write and the decay of step t)

    (H. H. Mao, "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights", 2022.) Without
    gates this is the additive rule, with one scalar gate per head the gated rule.

    A token with k = v = 0 and log gates 0 leaves the state bit for bit as it is. One with log gate -inf forgets all
    before it: what it and later tokens read of the state, and all of its gradients, are as if the sequence had
    started there. (Its own exclusive read is of the state before.)

    States and sums are float32, or float64 when q, k or v is. Sums in "cpu" overflow from 1e28 on, and not from 1e38.
    (Gradients as well, where backward() is called outside of autocast, as PyTorch asks; inside, "chunked" multiplies
    in autocast's dtype.)

    Args:
        q: queries (B, T, H, K).
        k: keys (B, T, G, K); H is a multiple of G, and query head h reads the state of key/value head h // (H // G).
        v: values (B, T, G, V).
        key_log_decay: log f, natural logarithm per step, (B, T, G, K), or (B, T, G, 1) for one gate per head; None
            for no gate. At most 0, which is not checked (a positive one lets the state grow); may be -inf.
        value_log_decay: log z, likewise, (B, T, G, V) or (B, T, G, 1).
        scale: factor of the output.
        initial_state: S_0 (N, G, K, V), in the dtype of the state; None for zeros.
        output_final_state: whether to return the state after the last token.
        inclusive: whether token t reads the state after its own decay and write, or before both.
        cu_seqlens: [0, n_1, n_1 + n_2, ...], int32 or int64, (N + 1,): N sequences of n_1, n_2, ... tokens, possibly
            none, packed into one row (B = 1). None for B sequences of T tokens, N = B.
        backend: "reference", "chunked", "cpu" or "gpu" (Triton); "auto" takes "cpu" for tensors on a CPU, except
            float64 ones and those of a large state without vector gates that need gradients; "gpu" on an NVIDIA GPU of
            the Ampere generation or later, except for float64 and a large state without vector gates, unless
            FASTWEIGHTS_TRITON=0 is in the environment; and "chunked" for all else. Only "reference" and "chunked" can
            be differentiated twice.

    Returns:
        o (B, T, H, V) in v's dtype, and the state (N, G, K, V) after the last token, or None.

    Raises:
        TypeError: an argument is no tensor or of a dtype that does not fit, such as float64 for "cpu" and "gpu".
        ValueError: shapes, devices or the bounds in `cu_seqlens` do not fit, the backend is not known, or tensors are
            not where it computes. ("gpu" does not look at the bounds, which are on the GPU.)
        ImportError: the backend is "cpu", and Numba is not installed, or "gpu", and Triton is not.
    """
    check_inputs(q, k, v, initial_state, cu_seqlens)
    check_gate("key_log_decay", key_log_decay, k, "k")
    check_gate("value_log_decay", value_log_decay, v, "v")
    # Plain products are the faster ones for a large state that decays as a whole: on a GPU, and for gradients on a CPU.
    products = (
        k.shape[3] * v.shape[3] >= LARGE
        and are_scalar(key_log_decay, value_log_decay)
        and (not q.is_cpu or needs_gradients(q, k, v, key_log_decay, value_log_decay, initial_state))
    )
    rule = _backend(_DECAY_RULE, backend, q.device.type, compute_dtype(q, k, v), products=products)
    o, final_state = rule(q, k, v, key_log_decay, value_log_decay, initial_state, cu_seqlens, scale, inclusive)
    return o, final_state if output_final_state else None


def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    beta: Float[Tensor, "B T G 1"],
    log_decay: Float[Tensor, "B T G 1"] | None = None,
    *,
    scale: float = 1.0,
    initial_state: Float[Tensor, "N G K V"] | None = None,
    output_final_state: bool = False,
    inclusive: bool = True,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N G K V"] | None]:
    """Fast weights that learn by the delta rule: what is written is what the value is beyond the state's own answer.

    With decay a = exp(log_decay), from S_0 = initial_state or 0,

        S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T
        o_t = scale * S_t^T q_t          (inclusive)
        o_t = scale * S_{t-1}^T q_t      (not inclusive: before the write and the decay of step t)

    (I. Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", 2021, arXiv 2102.11174; with decay,
    S. Yang et al., "Gated Delta Networks", 2024, arXiv 2412.06464.) By default a token reads after its own write.

    Keys are used as they are: to normalise them is the caller's business. With keys of length 1 and beta in [0, 1] the
    state stays bounded, and beta = 1 replaces what it held for a key by v; where beta_t |k_t|^2 is above 2 it may grow
    without bound.

    A token with k = v = 0 and log decay 0 leaves the state bit for bit as it is. One with log decay -inf forgets all
    before it: what it and later tokens read of the state, and all of its gradients, are as if the sequence had
    started there. (Its own exclusive read is of the state before.)

    States and sums are float32, or float64 when q, k or v is; those of gradients where backward() is called outside of
    autocast (see `decay_rule`).

    Args:
        q: queries (B, T, H, K).
        k: keys (B, T, G, K); H is a multiple of G, and query head h reads the state of key/value head h // (H // G).
        v: values (B, T, G, V).
        beta: how much of the difference is written, (B, T, G, 1). Not checked.
        log_decay: log a, natural logarithm per step, (B, T, G, 1); None for no decay. At most 0, which is not checked
            (a positive one lets the state grow); may be -inf.
        scale: factor of the output.
        initial_state: S_0 (N, G, K, V), in the dtype of the state; None for zeros.
        output_final_state: whether to return the state after the last token.
        inclusive: whether token t reads the state after its own decay and write, or before both.
        cu_seqlens: [0, n_1, n_1 + n_2, ...], int32 or int64, (N + 1,): N sequences of n_1, n_2, ... tokens, possibly
            none, packed into one row (B = 1). None for B sequences of T tokens, N = B.
        backend: "reference", "chunked", "cpu" or "gpu" (Triton, keys of up to 256 channels); "auto" takes "cpu" for
            tensors on a CPU, except float64 ones, and "chunked" for all others, but for "gpu" on an NVIDIA GPU of the
            Ampere generation or later with FASTWEIGHTS_TRITON=1 in the environment: no GPU has run it yet. Only
            "reference" and "chunked" can be differentiated twice.

    Returns:
        o (B, T, H, V) in v's dtype, and the state (N, G, K, V) after the last token, or None.

    Raises:
        TypeError: an argument is no tensor or of a dtype that does not fit, such as float64 for "cpu" and "gpu".
        ValueError: shapes, devices or the bounds in `cu_seqlens` do not fit, the backend is not known, or tensors are
            not where it computes, or too wide for it. ("gpu" does not look at the bounds, which are on the GPU.)
        ImportError: the backend is "cpu", and Numba is not installed, or "gpu", and Triton is not.
    """
    check_inputs(q, k, v, initial_state, cu_seqlens)
    check_per_head("beta", beta, k)
    if log_decay is not None:
        check_per_head("log_decay", log_decay, k)
    products = not q.is_cpu and not _asks_for_delta_kernels(k.shape[3])
    rule = _backend(_DELTA_RULE, backend, q.device.type, compute_dtype(q, k, v), products=products)
    o, final_state = rule(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, inclusive)
    return o, final_state if output_final_state else None


def _asks_for_delta_kernels(key_width: int) -> bool:
    """Whether "auto" may take those for GPUs: only if it is said, as none has run them yet."""
    return key_width <= WIDEST and os.environ.get("FASTWEIGHTS_TRITON") == "1"


def _backend(
    rules: dict[str, Callable], backend: str, device: str, dtype: torch.dtype, *, products: bool = False
) -> Callable:
    if backend == "auto":
        backend = _choose(rules, device, dtype, products=products)
    elif backend not in rules:
        known = ", ".join(repr(name) for name in ("auto", *rules))
        raise ValueError(f"backend is {backend!r}; it must be one of {known}")
    elif backend in ("cpu", "gpu") and forward_ad._current_level >= 0:
        raise ValueError(f"backend is {backend!r}, which has no forward-mode derivatives: take 'auto' or 'chunked'")
    return rules[backend]


def _choose(rules: dict[str, Callable], device: str, dtype: torch.dtype, *, products: bool = False) -> str:
    backend = "cpu" if device == "cpu" and dtype == torch.float32 and not products else "chunked"
    if (
        device == "cuda"
        and dtype == torch.float32
        and not products
        and os.environ.get("FASTWEIGHTS_TRITON") != "0"
        and suits_this_machine()
    ):
        backend = "gpu"
    if forward_ad._current_level >= 0:
        backend = "chunked"
    if not torch.compiler.is_compiling():
        _log_choice(device, dtype, backend)
    return backend


@cache
def _log_choice(device: str, dtype: torch.dtype, backend: str) -> None:
    logger.info("backend='auto' takes %r for %s tensors on %s", backend, dtype, device)
