"""The decay rule on GPUs: Triton kernels as torch custom ops, with gradients.

Works under torch.compile, autocast and gradient checkpointing, for float32, bfloat16 and float16 inputs; state and sums
are float32. Nothing waits for the GPU: the bounds of packed sequences stay there. Under TRITON_INTERPRET=1, set before
the first call, the same kernels run on a CPU, slowly: for tests.

Notation
    N        sequences: B, or those packed into one row by cu_seqlens
    M        chunks of all sequences (gpu_kernels.py)
    log_f, log_z   logs of the key-side and value-side gates
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..triton.calls import Chunks, check_gpu, chunks_of, empty_outputs, or_zeros, side

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK = 64
"""Tokens between two states that are kept while a call runs; the kernels are parallel over chunks."""
SUB = 16
"""Tokens that are compared pair by pair."""
TILE = 64
"""Longest side of a tile of the state."""


def decay_rule_gpu(
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
    """Run the rule chunk by chunk; for the backward pass it keeps its inputs alone."""
    check_gpu(q, compute_dtype(q, k, v))
    tensors = (q, k, v, key_log_decay, value_log_decay, initial_state)
    return _forward_op(*tensors, cu_seqlens, float(scale), inclusive)


class _Problem(NamedTuple):
    """The tensors of a call as rows of tokens; gates are as wide as what they decay."""

    q: Float[Tensor, "tokens H K"]
    k: Float[Tensor, "tokens G K"]
    v: Float[Tensor, "tokens G V"]
    log_f: Float[Tensor, "tokens G K"] | None
    log_z: Float[Tensor, "tokens G V"] | None
    N: int
    shift: int
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Query heads, key/value heads, query heads to each, key width, value width."""
        H, K = self.q.shape[1:]
        G, V = self.v.shape[1:]
        return H, G, H // G, K, V

    @property
    def sides(self) -> tuple[int, int]:
        """Of a tile of the state."""
        return side(self.k.shape[2], TILE), side(self.v.shape[2], TILE)

    @property
    def tiles(self) -> tuple[int, int]:
        """How many of them lie along the keys, and along the values."""
        (BK, BV), (K, V) = self.sides, self.sizes[3:]
        return -(-K // BK), -(-V // BV)

    @property
    def compiled_for(self) -> dict:
        """What most kernels are compiled for."""
        # One TF32 product keeps what bfloat16 has, and half of float16's last digit.
        exact = {self.q.dtype, self.k.dtype, self.v.dtype} != {torch.bfloat16}
        return {
            "KEY_GATE": self.log_f is not None,
            "VALUE_GATE": self.log_z is not None,
            "CHUNK": CHUNK,
            "BK": self.sides[0],
            "BV": self.sides[1],
            "PRECISION": "tf32x3" if exact else "tf32",
        }

    @property
    def gates(self) -> tuple[Tensor, Tensor]:
        """log_f and log_z, or for one that is None some tensor, which is not read."""
        return self.q if self.log_f is None else self.log_f, self.q if self.log_z is None else self.log_z

    def new(self, *shape: int) -> Tensor:
        """A tensor of float32 numbers that are still to be written."""
        return self.q.new_empty(shape, dtype=torch.float32)


def _kernels() -> Any:
    """The module of kernels, imported when they are needed: Triton need not be installed."""
    from . import gpu_kernels

    return gpu_kernels


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor | None,
    log_z: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    inclusive: bool,
) -> _Problem:
    log_f, log_z = _rows_of_gate(log_f, k.shape[3]), _rows_of_gate(log_z, v.shape[3])
    N = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return _Problem(q, k, v, log_f, log_z, N, int(not inclusive), scale)


def _rows_of_gate(gate: Tensor | None, width: int) -> Tensor | None:
    return None if gate is None else gate.flatten(0, 1).expand(-1, -1, width)


def _strides(*tensors: Tensor) -> list[int]:
    return [size for x in tensors for size in x.stride()]


def _states(p: _Problem, c: Chunks, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state before each chunk (M, G, K, V), what of it is left after it (M, G, K) and (M, G, V), the last state."""
    (_, G, _, K, V), M = p.sizes, len(c.starts)
    states, F, Z, final_state = p.new(M, G, K, V), p.new(M, G, K), p.new(M, G, V), p.new(p.N, G, K, V)
    initial_state = or_zeros(initial_state, final_state)
    if M:
        _kernels().written[(M, G, prod(p.tiles))](
            p.k, p.v, *p.gates, c.starts, c.ends, states, F, Z,
            *_strides(p.k, p.v, *p.gates), G, K, V, **p.compiled_for,
        )  # fmt: skip
    _scan(p, c, states, F, Z, initial_state, final_state, back=False)
    return states, F, Z, final_state


def _scan(
    p: _Problem, c: Chunks, states: Tensor, F: Tensor, Z: Tensor, before: Tensor, after: Tensor, back: bool
) -> None:
    _, G, _, K, V = p.sizes
    BK, BV = p.sides
    if p.N:
        _kernels().scan[(p.N, G, prod(p.tiles))](
            states, F, Z, c.first, c.counts, before, after, G, K, V, BACK=back, BK=BK, BV=BV
        )


def _pairs(p: _Problem, c: Chunks, x: Tensor, y: Tensor, log_gate: Tensor | None, scale: float, side: int) -> Tensor:
    """What x reads of y within each sub-chunk: (tokens, H, SUB)."""
    H, _, R = p.sizes[:3]
    A, gate = p.new(len(x), H, SUB), p.q if log_gate is None else log_gate
    _kernels().pairs[(len(c.starts), H)](
        x, y, gate, c.starts, c.ends, A, *_strides(x, y, gate), H, R, x.shape[2], scale,
        GATED=log_gate is not None, SHIFT=p.shift, CHUNK=CHUNK, SUB=SUB, BD=side,
    )  # fmt: skip
    return A


@torch.library.custom_op("fastweights::decay_rule_gpu", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """(o, final state)."""
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        p = _problem(q, k, v, log_f, log_z, cu_seqlens, scale, inclusive)
        if q.shape[1] == 1 and cu_seqlens is None and len(q):
            return _step(p, initial_state, *empty_outputs(q, v, None))
        c = chunks_of(q, cu_seqlens, CHUNK)
        states, _, _, final_state = _states(p, c, initial_state)
        H, G, R, K, V = p.sizes
        M, parts = len(c.starts), p.tiles[0]
        o = v.new_empty((1, *q.shape[:3], V)) if parts == 1 else p.new(parts, *q.shape[:3], V)
        if M:
            A = _pairs(p, c, p.q, p.k, p.log_f, scale, p.sides[0])
            _kernels().outputs[(M, H, prod(p.tiles))](
                p.q, p.k, p.v, *p.gates, A, states, c.starts, c.ends, c.sequence_starts, o,
                *_strides(p.q, p.k, p.v, *p.gates), len(p.q), H, G, R, K, V, scale,
                SHIFT=p.shift, SUB=SUB, **p.compiled_for,
            )  # fmt: skip
        return o[0] if parts == 1 else o.sum(0).to(v.dtype), final_state


@_forward_op.register_fake
def _(q, k, v, log_f, log_z, initial_state, cu_seqlens, scale, inclusive):
    return empty_outputs(q, v, cu_seqlens)


def _step(p: _Problem, initial_state: Tensor | None, o: Tensor, final_state: Tensor) -> tuple[Tensor, Tensor]:
    H, G, R, K, V = p.sizes
    BK, BV = p.sides
    before = or_zeros(initial_state, final_state)
    _kernels().step[(p.N, G, p.tiles[1])](
        p.q, p.k, p.v, *p.gates, before, o, final_state, *_strides(p.q, p.k, p.v, *p.gates), H, G, R, K, V, p.scale,
        KEY_GATE=p.log_f is not None, VALUE_GATE=p.log_z is not None, SHIFT=p.shift,
        READERS=1 << (R - 1).bit_length(), BK=BK, BV=BV,
    )  # fmt: skip
    return o, final_state


@torch.library.custom_op("fastweights::decay_rule_gpu_backward", mutates_args=())
def _backward_op(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor | None,
    log_z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    inclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dlog_f, dlog_z, gradient of the initial state); empty for a gate that is None."""
    with torch.cuda.device_of(q):
        p, c = _problem(q, k, v, log_f, log_z, cu_seqlens, scale, inclusive), chunks_of(q, cu_seqlens, CHUNK)
        states, F, Z, final_state = _states(p, c, initial_state)
        (H, G, R, K, V), (key_tiles, value_tiles) = p.sizes, p.tiles
        M, tokens = len(c.starts), len(p.q)
        given = p.new(1, 1, 1).zero_().expand(tokens, H, V) if do is None else do.flatten(0, 1)
        dfinal = or_zeros(dfinal, final_state)
        dstates, dinitial = torch.empty_like(states), torch.empty_like(final_state)
        grid = (M, G, prod(p.tiles))
        if M:
            _kernels().read_back[grid](
                p.q, given, *p.gates, c.starts, c.ends, c.sequence_starts, dstates,
                *_strides(p.q, given, *p.gates), G, R, K, V, scale, SHIFT=p.shift, SUB=SUB, **p.compiled_for,
            )  # fmt: skip
        _scan(p, c, dstates, F, Z, dinitial, dfinal, back=True)
        dq, dk, dv = p.new(value_tiles, tokens, H, K), p.new(value_tiles, tokens, G, K), p.new(key_tiles, tokens, G, V)
        dlog_f = dk if log_f is None else torch.empty_like(dk)
        dlog_z = dv if log_z is None else torch.empty_like(dv)
        if M:
            A = _pairs(p, c, p.q, p.k, p.log_f, scale, p.sides[0])
            B = _pairs(p, c, given, p.v, p.log_z, 1.0, p.sides[1])
            _kernels().gradients[grid](
                p.q, p.k, p.v, *p.gates, given, A, B, states, dstates, c.starts, c.ends, c.sequence_starts,
                dq, dk, dv, dlog_f, dlog_z, *_strides(p.q, p.k, p.v, *p.gates, given), tokens, H, G, R, K, V, scale,
                SHIFT=p.shift, SUB=SUB, **p.compiled_for,
            )  # fmt: skip
        results = [_joined(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v), (dlog_f, log_f), (dlog_z, log_z))]
        return *results, dinitial  # type: ignore[return-value]


def _joined(parts: Tensor, x: Tensor | None) -> Tensor:
    """The gradient of x from its parts; that of a gate for each head is the sum over its channels."""
    if x is None:
        return parts.new_empty((0,))
    whole = parts[0] if len(parts) == 1 else parts.sum(0)
    if x.shape[-1] != whole.shape[-1]:
        whole = whole.sum(-1, keepdim=True)
    return whole.view(x.shape).to(x.dtype)


@_backward_op.register_fake
def _(do, dfinal, q, k, v, log_f, log_z, initial_state, cu_seqlens, scale, inclusive):
    # As `_joined` makes them: contiguous, whatever the strides of x.
    gradients = [
        q.new_empty((0,), dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in (q, k, v, log_f, log_z)
    ]
    return *gradients, empty_outputs(q, v, cu_seqlens)[1]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scale, inclusive = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale, ctx.inclusive = scale, inclusive
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal):
    *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    *grads, dinitial = _backward_op(do, dfinal, *tensors, initial_state, cu_seqlens, ctx.scale, ctx.inclusive)
    grads = [None if x is None else dx for x, dx in zip(tensors, grads, strict=True)]
    return *grads, None if initial_state is None else dinitial, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
