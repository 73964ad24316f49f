"""The delta rule on CPUs: Numba kernels as torch custom ops, with threads and gradients.

Works under torch.compile, autocast and gradient checkpointing, for float32, bfloat16 and float16
inputs; state and sums are float32. Several Python threads may call it at once, and so may a process
after a fork.

Notation
    B, T     batch, time
    H, G     query heads, key/value heads
    K, V     key and value width
    N        sequences: B, or those packed into one row by cu_seqlens
    errors   (B, T, G, V): what each value is beyond what the state already gives for its key
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import compute_dtype, needs_gradients
from ..numba import calls
from ..numba.calls import address, rows_of_float32, strides
from ..numba.runtime import load_kernels, thread_count

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def delta_rule_cpu(
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
    """Run the rule token by token, with the state in the cache; for the backward pass it keeps each token's error."""
    calls.check_cpu(q, compute_dtype(q, k, v))
    tensors = (q, k, v, beta, log_decay, initial_state)
    keep = needs_gradients(*tensors)
    o, final_state, *_ = _forward_op(*tensors, cu_seqlens, float(scale), inclusive, keep)
    return o, final_state


@torch.library.custom_op("fastweights::delta_rule_cpu", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    inclusive: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, checkpoints of the state and errors for the backward pass if `keep`)."""
    kernel = load_kernels("delta_rule").cpu_forward
    o, final_state, checkpoints, errors = _outputs(q, v, cu_seqlens, keep)
    o_float32 = o if o.dtype == torch.float32 else calls.empty(o.shape)
    outputs = kernel.Outputs(o_float32.data_ptr(), final_state.data_ptr())
    call = _call(q, k, v, beta, log_decay, initial_state, cu_seqlens, inclusive)
    kept = {"checkpoints": address(checkpoints if keep else None), "errors": address(errors if keep else None)}
    call.run(kernel.forward, kernel.buffer_sizes, outputs, scale, **kept)
    if o_float32 is not o:
        o.copy_(o_float32)
    return o, final_state, checkpoints, errors


@_forward_op.register_fake
def _(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, inclusive, keep):
    return _outputs(q, v, cu_seqlens, keep)


def _outputs(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    return *calls.outputs(q, v, cu_seqlens, keep), calls.empty(v.shape if keep else (0,))


@torch.library.custom_op("fastweights::delta_rule_cpu_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    errors: Tensor,
    scale: float,
    inclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbeta, dlog_decay, gradient of the initial state); empty for a decay that is None."""
    kernel = load_kernels("delta_rule").cpu_backward
    call = _call(q, k, v, beta, log_decay, None, cu_seqlens, inclusive)
    do, dfinal = rows_of_float32(do), None if dfinal is None else dfinal.contiguous()
    dq, dk, dbeta = (calls.empty((call.parts, *x.shape)) for x in (q, k, beta))
    dlog_decay = calls.empty((call.parts, *beta.shape) if log_decay is not None else (1, 0))
    dv, dinitial = calls.empty(v.shape), calls.empty((call.N, *k.shape[2:], call.V))
    gradients = kernel.Gradients(
        do=address(do),
        do_strides=strides(do),
        dfinal=address(dfinal),
        dq=dq.data_ptr(),
        dk=dk.data_ptr(),
        dv=dv.data_ptr(),
        dbeta=dbeta.data_ptr(),
        dlog_decay=dlog_decay.data_ptr(),
        dinitial=dinitial.data_ptr(),
        tokens=q.shape[0] * q.shape[1],
    )
    kept = {"checkpoints": checkpoints.data_ptr(), "errors": errors.data_ptr()}
    call.run(kernel.backward, kernel.buffer_sizes, gradients, scale, **kept)
    dq, dk, dbeta, dlog_decay = (x[0] if call.parts == 1 else x.sum(0) for x in (dq, dk, dbeta, dlog_decay))
    dlog_decay = dlog_decay if log_decay is None else dlog_decay.to(log_decay.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta.to(beta.dtype), dlog_decay, dinitial


@_backward_op.register_fake
def _(do, dfinal, q, k, v, beta, log_decay, cu_seqlens, checkpoints, errors, scale, inclusive):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tensors = (q, k, v, beta, log_decay)
    gradients = [calls.empty((0,)) if x is None else calls.empty(x.shape, x.dtype) for x in tensors]
    return *gradients, calls.empty((N, *k.shape[2:], v.shape[3]))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, inclusive, _ = inputs
    ctx.save_for_backward(q, k, v, beta, log_decay, cu_seqlens, *output[2:])
    ctx.scale, ctx.inclusive = scale, inclusive
    ctx.has_initial_state = initial_state is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal, *_):
    saved = ctx.saved_tensors  # once: gradient checkpointing refuses a second time
    *grads, dinitial = _backward_op(do, dfinal, *saved, ctx.scale, ctx.inclusive)
    grads = [None if x is None else dx for x, dx in zip(saved[:5], grads, strict=True)]
    return *grads, dinitial if ctx.has_initial_state else None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _call(q, k, v, beta, log_decay, initial_state, cu_seqlens, inclusive) -> calls.Call:
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
    threads = thread_count(q.numel() * v.shape[3])
    return calls.Call("delta_rule", tensors, initial_state, cu_seqlens, inclusive, threads)
