"""The decay rule on CPUs: Numba kernels as torch custom ops, with threads and gradients.

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

from ..checks import compute_dtype, sequence_bounds
from ..numba import calls
from ..numba.calls import address, rows_of_float32, strides
from ..numba.checkpoints import checkpoint_count
from ..numba.runtime import load_kernels, thread_count
from ..numba.scratch import guard_size

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}, but backend='cpu' needs CPU tensors; use backend='chunked'")
    if compute_dtype(q, k, v) == torch.float64:
        raise TypeError("backend='cpu' computes in float32, but q, k or v is float64; use backend='chunked'")
    tensors = (q, k, v, key_log_decay, value_log_decay, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
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
    kernel = load_kernels("decay_rule").cpu_forward
    o, final_state, checkpoints = _outputs(q, k, v, cu_seqlens, keep)
    call = _Call(q, k, v, log_f, log_z, initial_state, cu_seqlens, inclusive)
    o_float32 = o if o.dtype == torch.float32 else calls.empty(o.shape)
    outputs = kernel.Outputs(o_float32.data_ptr(), final_state.data_ptr())
    call.run(kernel.forward, kernel.buffer_sizes, outputs, scale, checkpoints if keep else None)
    if o_float32 is not o:
        o.copy_(o_float32)
    return o, final_state, checkpoints


@_forward_op.register_fake
def _(q, k, v, log_f, log_z, initial_state, cu_seqlens, scale, inclusive, keep):
    return _outputs(q, k, v, cu_seqlens, keep)


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
    call = _Call(q, k, v, log_f, log_z, None, cu_seqlens, inclusive)
    do, dfinal = rows_of_float32(do), None if dfinal is None else dfinal.contiguous()
    dq, dk = calls.empty((call.parts, *q.shape)), calls.empty((call.parts, *k.shape))
    # One value gate per head is folded into the key gate, and so is its gradient.
    folded = call.Vz == 1 and call.V != 1
    dlog_f = calls.empty((call.parts, *k.shape[:3], max(call.Kf, int(folded))))
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
    call.run(kernel.backward, kernel.buffer_sizes, gradients, scale, checkpoints)
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


class _Call:
    """The tensors of one call as the kernels want them; keeps them alive while their addresses are in use."""

    def __init__(self, q, k, v, log_f, log_z, initial_state, cu_seqlens, inclusive) -> None:
        B, self.T, H, self.K = q.shape
        self.G, self.V = v.shape[2:]
        self.R = H // self.G
        self.Kf = 0 if log_f is None else log_f.shape[3]
        self.Vz = 0 if log_z is None else log_z.shape[3]
        self.inclusive = inclusive
        self.tensors = [rows_of_float32(x) for x in (q, k, v, log_f, log_z)]
        self.initial_state = None if initial_state is None else initial_state.contiguous()
        self.N, self.bounds = B, None
        if cu_seqlens is not None:
            self.N = len(sequence_bounds(cu_seqlens, self.T))
            self.bounds = cu_seqlens.to(torch.int64).contiguous()
        self.threads = thread_count(q.numel() * self.V)
        self.parts = self._parts()

    def _parts(self) -> int:
        """Value columns are independent of each other: they make up for too few heads."""
        if self.threads <= self.N * self.G:
            return 1
        part_width = load_kernels("decay_rule").part_width
        return -(-self.V // part_width(self.V, -(-self.threads // max(self.N * self.G, 1))))

    def run(self, kernel, buffer_sizes, results, scale: float, checkpoints: Tensor | None) -> None:
        """Call the kernel for all units of work; `results` are the addresses of what it writes."""
        problem = load_kernels("decay_rule").Problem(
            self.T,
            self.G,
            self.R,
            self.K,
            self.V,
            self.parts,
            int(self.inclusive),
            self.Kf,
            self.Vz,
            address(self.bounds),
            *[x for tensor in self.tensors for x in (address(tensor), strides(tensor))],
            initial_state=address(self.initial_state),
            checkpoints=address(checkpoints),
            guard=guard_size(),
        )
        sizes, units = buffer_sizes(self.K, self.V, self.R, self.parts), self.N * self.G * self.parts
        calls.call_kernel(kernel, problem, results, sizes, scale, units, self.threads)


def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    checkpoints = checkpoint_count(N, T, packed=cu_seqlens is not None) if keep else 0
    return calls.empty((B, T, H, V), v.dtype), calls.empty((N, G, K, V)), calls.empty((checkpoints, G, K, V))
