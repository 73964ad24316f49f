"""The decay rule on CPUs: Numba kernels as torch custom ops, with threads and gradients.

A token or two of a large state that decays as a whole, as of a Fast Weight Layer that writes, go through products of
torch's instead: they read and write it once, and kernels first copy it to where their tiles fit.

Works under torch.compile, autocast and gradient checkpointing, for float32, bfloat16 and float16
inputs; state and sums are float32. Several Python threads may call it at once, and so may a process
after a fork.

Notation
    B, T     batch, time
    H, G     query heads, key/value heads
    K, V     key and value width
    N        sequences: B, or those packed into one row by cu_seqlens
    log_f, log_z   logs of the key-side and value-side gates
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import LARGE, are_scalar, compute_dtype, needs_gradients
from ..numba import calls
from ..numba.calls import address, rows_of_float32, strides
from ..numba.runtime import is_fork, load_kernels, thread_count

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_FEW = 2
"""Tokens; of more, a kernel's few passes over a large state are the fewer."""


def decay_rule_cpu(
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
    """Run the rule token by token, with the state in registers; the backward pass keeps no states."""
    calls.check_cpu(q, compute_dtype(q, k, v))
    tensors = (q, k, v, key_log_decay, value_log_decay, initial_state)
    keep = needs_gradients(*tensors)
    o, final_state, _ = _forward_op(*tensors, cu_seqlens, float(scale), inclusive, keep)
    return o, final_state


@torch.library.custom_op("fastweights::decay_rule_cpu", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor | None,
    log_z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    inclusive: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final state, checkpoints of the state for the backward pass if `keep`)."""
    o, final_state, checkpoints = calls.outputs(q, v, cu_seqlens, keep)
    if not keep and cu_seqlens is None and _are_few(q, k, v, log_f, log_z):
        log_decay = calls.empty(k.shape[:3]).zero_()
        for gate in (log_f, log_z):
            log_decay += 0.0 if gate is None else gate[..., 0]
        with torch.autocast("cpu", enabled=False):
            _take_steps(q, k, v, log_decay.exp().tolist(), initial_state, scale, inclusive, o, final_state)
        return o, final_state, checkpoints
    kernel = load_kernels("decay_rule").cpu_forward
    call = _call(q, k, v, log_f, log_z, initial_state, cu_seqlens, inclusive)
    o_float32 = o if o.dtype == torch.float32 else calls.empty(o.shape)
    outputs = kernel.Outputs(o_float32.data_ptr(), final_state.data_ptr())
    more = {"checkpoints": checkpoints.data_ptr() if keep else 0, **_gate_widths(log_f, log_z)}
    call.run(kernel.forward, kernel.buffer_sizes, outputs, scale, **more)
    if o_float32 is not o:
        o.copy_(o_float32)
    return o, final_state, checkpoints


def _are_few(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor | None, log_z: Tensor | None) -> bool:
    return bool(
        1 <= k.shape[1] <= _FEW
        and k.shape[3] * v.shape[3] >= LARGE
        and are_scalar(log_f, log_z)
        and all(x.dtype == torch.float32 for x in (q, k, v))
        and not is_fork()  # without torch's threads, which these products would wait for
    )


def _take_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: list[list[list[float]]],
    initial_state: Tensor | None,
    scale: float,
    inclusive: bool,
    o: Tensor,
    final_state: Tensor,
) -> None:
    """One by one, into o and the final state; `torch.addr` is one pass, which leaves out what a gate of 0 forgets."""
    (B, T, G, _), queries = k.shape, q.unflatten(2, (k.shape[2], -1))
    outputs = o.unflatten(2, (G, -1))
    for n in range(B):
        for g in range(G):
            final = final_state[n, g]
            S = final.zero_() if initial_state is None else initial_state[n, g].float()
            for t in range(T):
                key, value, decay = k[n, t, g], v[n, t, g], decays[n][t][g]
                if not inclusive:
                    torch.mul(queries[n, t, g] @ S, scale, out=outputs[n, t, g])
                if decay != 1 or key.any() or value.any():
                    S = torch.addr(S, key, value, beta=decay, out=final)
                if inclusive:
                    torch.mul(queries[n, t, g] @ S, scale, out=outputs[n, t, g])
            if S is not final:
                final.copy_(S)


@_forward_op.register_fake
def _(q, k, v, log_f, log_z, initial_state, cu_seqlens, scale, inclusive, keep):
    return calls.outputs(q, v, cu_seqlens, keep)


@torch.library.custom_op("fastweights::decay_rule_cpu_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor | None,
    log_z: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    inclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dlog_f, dlog_z, gradient of the initial state); empty for a gate that is None."""
    kernel = load_kernels("decay_rule").cpu_backward
    call, widths = _call(q, k, v, log_f, log_z, None, cu_seqlens, inclusive), _gate_widths(log_f, log_z)
    do, dfinal = rows_of_float32(do), None if dfinal is None else dfinal.contiguous()
    dq, dk = calls.empty((call.parts, *q.shape)), calls.empty((call.parts, *k.shape))
    # One value gate per head is folded into the key gate, and so is its gradient.
    folded = widths["Vz"] == 1 and call.V != 1
    dlog_f = calls.empty((call.parts, *k.shape[:3], max(widths["Kf"], int(folded))))
    dv, dlog_z = calls.empty(v.shape), calls.empty((0,) if log_z is None else log_z.shape)
    dinitial = calls.empty((call.N, *k.shape[2:], call.V))
    gradients = kernel.Gradients(
        do=address(do),
        do_strides=strides(do),
        dfinal=address(dfinal),
        dq=dq.data_ptr(),
        dk=dk.data_ptr(),
        dv=dv.data_ptr(),
        dlog_f=dlog_f.data_ptr(),
        dlog_z=dlog_z.data_ptr(),
        dinitial=dinitial.data_ptr(),
        tokens=q.shape[0] * q.shape[1],
    )
    call.run(kernel.backward, kernel.buffer_sizes, gradients, scale, checkpoints=checkpoints.data_ptr(), **widths)
    dq, dk, dlog_f = (x[0] if call.parts == 1 else x.sum(0) for x in (dq, dk, dlog_f))
    if folded:
        dlog_z = dlog_f.sum(-1, keepdim=True)
    dlog_f = calls.empty((0,)) if log_f is None else dlog_f.to(log_f.dtype)
    dlog_z = dlog_z if log_z is None else dlog_z.to(log_z.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dlog_f, dlog_z, dinitial


@_backward_op.register_fake
def _(do, dfinal, q, k, v, log_f, log_z, cu_seqlens, checkpoints, scale, inclusive):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gradients = [calls.empty((0,)) if x is None else calls.empty(x.shape, x.dtype) for x in (q, k, v, log_f, log_z)]
    return *gradients, calls.empty((N, *k.shape[2:], v.shape[3]))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, log_f, log_z, initial_state, cu_seqlens, scale, inclusive, _ = inputs
    ctx.save_for_backward(q, k, v, log_f, log_z, cu_seqlens, output[2])
    ctx.scale, ctx.inclusive = scale, inclusive
    ctx.has_initial_state = initial_state is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal, _):
    *tensors, cu_seqlens, checkpoints = ctx.saved_tensors
    *grads, dinitial = _backward_op(do, dfinal, *tensors, cu_seqlens, checkpoints, ctx.scale, ctx.inclusive)
    grads = [None if x is None else dx for x, dx in zip(tensors, grads, strict=True)]
    return *grads, dinitial if ctx.has_initial_state else None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _call(q, k, v, log_f, log_z, initial_state, cu_seqlens, inclusive) -> calls.Call:
    tensors = {"q": q, "k": k, "v": v, "log_f": log_f, "log_z": log_z}
    threads = thread_count(q.numel() * v.shape[3])
    return calls.Call("decay_rule", tensors, initial_state, cu_seqlens, inclusive, threads)


def _gate_widths(log_f: Tensor | None, log_z: Tensor | None) -> dict[str, int]:
    return {"Kf": 0 if log_f is None else log_f.shape[3], "Vz": 0 if log_z is None else log_z.shape[3]}
