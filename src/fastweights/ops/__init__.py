"""Recurrences on tensors. They know nothing of models: one door per rule, several backends behind it."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

from .checks import check_decay_inputs, compute_dtype
from .decay_rule.chunked import decay_rule_chunked
from .decay_rule.cpu import decay_rule_cpu
from .decay_rule.reference import decay_rule_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["decay_rule"]

logger = logging.getLogger("fastweights")

_DECAY_RULE = {
    "reference": decay_rule_reference,
    "chunked": decay_rule_chunked,
    "cpu": decay_rule_cpu,
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

    q has H heads, k and v have G; H is a multiple of G, and query head h reads the state of
    key/value head h // (H // G). A log gate is at most 0 (not checked; a positive one lets the state
    grow) and may be -inf, which forgets all before; Kf is K, or 1 for one gate per head, and Vz
    likewise. A token with k = v = 0 and log gates 0 leaves the state bit for bit as it is.

    `cu_seqlens` = [0, n_1, n_1 + n_2, ...] (int32 or int64) packs N sequences, possibly empty ones,
    into one row (B = 1); otherwise N = B.

    Returns o in v's dtype and, if `output_final_state`, the state after the last token. States and
    sums are float32, or float64 when q, k or v is. Backends: "reference", "chunked", "cpu"; "auto"
    takes "cpu" for tensors on a CPU, except float64 ones, and "chunked" for all others. Only
    "reference" and "chunked" can be differentiated twice; sums in "cpu" overflow from 1e28 on, and not from 1e38.
    """
    check_decay_inputs(q, k, v, key_log_decay, value_log_decay, initial_state, cu_seqlens)
    if backend == "auto":
        backend = _choose(q.device.type, compute_dtype(q, k, v))
    elif backend not in _DECAY_RULE:
        known = ", ".join(repr(name) for name in ("auto", *_DECAY_RULE))
        raise ValueError(f"backend is {backend!r}; it must be one of {known}")
    rule = _DECAY_RULE[backend]
    o, final_state = rule(q, k, v, key_log_decay, value_log_decay, initial_state, cu_seqlens, scale, inclusive)
    return o, final_state if output_final_state else None


def _choose(device: str, dtype: torch.dtype) -> str:
    backend = "cpu" if device == "cpu" and dtype == torch.float32 else "chunked"
    if not torch.compiler.is_compiling():
        _log_choice(device, dtype, backend)
    return backend


@cache
def _log_choice(device: str, dtype: torch.dtype, backend: str) -> None:
    logger.info("backend='auto' takes %r for %s tensors on %s", backend, dtype, device)
