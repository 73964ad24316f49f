"""The decay rule on GPUs: Triton kernels as torch custom ops, with gradients.

Works under torch.compile, autocast and gradient checkpointing, for float32, bfloat16 and float16 inputs; state and sums
are float32. Nothing waits for the GPU: the bounds of packed sequences stay there. Under TRITON_INTERPRET=1, set before
the first call, the same kernels run on a CPU, slowly: for tests.

A chunk whose gates decay mildly is worked out by products of matrices; one with a gate that is 0, or almost, pair by
pair (gpu_exact.py). Which is which only the GPU knows: kernels of both kinds are launched, and skip the others' chunks.

Notation
    N        sequences: B, or those packed into one row by cu_seqlens
    M        chunks of all sequences (gpu_kernels.py)
    log_f, log_z   logs of the key-side and value-side gates
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK = 64
"""Tokens between two states that are kept while a call runs; the kernels are parallel over chunks."""
SUB = 16
"""Tokens that are compared pair by pair, in a chunk with strong gates."""
LIMITS = {"bf16": 75.0, "tf32": 75.0, "tf32x3": 30.0}
"""A chunk's gates are strong if some channel decays by more than e to minus this in half of it; by the precision of
products, as what one gate decays another makes up for."""
WIDEST = 128
"""Keys and values of more channels are worked out like strong gates."""


class Launch(NamedTuple):
    """How a kernel is launched."""

    BK: int
    """Longest side of a tile of the state along the keys."""
    BV: int
    """Along the values."""
    num_warps: int
    precision: str = "tf32"
    """Of products, where q, k and v are bfloat16: one TF32 product keeps all that these have."""
    num_stages: int = 1


LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "written": (Launch(32, 64, 4), Launch(32, 128, 4)),
    "read_back": (Launch(32, 64, 4), Launch(32, 128, 4)),
    "scan": (Launch(16, 64, 2, num_stages=3), Launch(16, 64, 2, num_stages=3)),
    "outputs": (Launch(64, 64, 4, "bf16"), Launch(128, 64, 8, "bf16")),
    "gradients": (Launch(64, 64, 8, "bf16"), Launch(64, 64, 8, "bf16")),
    "exact": (Launch(32, 64, 4), Launch(32, 64, 4)),
    "step": (Launch(64, 32, 2), Launch(128, 32, 4)),
}
"""By kernel, for keys and values of up to 64 channels, and for wider ones. A program of `gradients` takes a
tile of one side and all of the other."""


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


def check_gpu(q: Tensor, dtype: torch.dtype) -> None:
    """Whether these kernels can run.

    Raises:
        TypeError: the state would be float64.
        ValueError: the tensors are not on a GPU.
        ImportError: Triton is not installed.
    """
    if dtype == torch.float64:
        raise TypeError("backend='gpu' computes in float32, but q, k or v is float64; use backend='chunked'")
    if q.device.type != "cuda" and not (q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"backend='gpu' needs tensors on a GPU, but q is on {q.device}; use backend='auto'")
    if not torch.compiler.is_compiling() and not is_available():
        raise ImportError("backend='gpu' needs Triton, which is not installed: pip install triton")


@cache
def is_available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


class _Chunks(NamedTuple):
    """Where chunks and sequences start and end in rows of tokens; nothing of it is known outside of the GPU."""

    starts: Int[Tensor, " M"]
    """First token of each chunk; chunks that are not needed start, and end, at 0."""
    ends: Int[Tensor, " M"]
    """End of the sequence of each chunk."""
    sequence_starts: Int[Tensor, " M"]
    """Start of it; -1 for a chunk that is not needed."""
    first: Int[Tensor, " N"]
    """First chunk of each sequence."""
    sequences: Int[Tensor, " M"]
    """The sequence of each chunk."""
    counts: Int[Tensor, " N"]
    """Chunks of each sequence."""


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
    def is_narrow(self) -> bool:
        """Whether one tile may hold all of a state."""
        return max(self.sizes[3:]) <= WIDEST

    @property
    def may_be_strong(self) -> bool:
        """Whether some chunks may be left to the exact kernels."""
        return not self.is_narrow or self.log_f is not None or self.log_z is not None

    def launch(self, kernel: str) -> Launch:
        """How to launch a kernel, with the sides of its tiles."""
        K, V = self.sizes[3:]
        chosen = LAUNCHES[kernel][max(K, V) > 64]
        return chosen._replace(BK=min(chosen.BK, _side(K)), BV=min(chosen.BV, _side(V)))

    def tiles(self, kernel: str) -> tuple[int, int]:
        """How many tiles lie along the keys, and along the values."""
        (K, V), chosen = self.sizes[3:], self.launch(kernel)
        return -(-K // chosen.BK), -(-V // chosen.BV)

    def options(self, kernel: str) -> dict:
        """What a kernel is launched with."""
        chosen = self.launch(kernel)
        return {"BK": chosen.BK, "BV": chosen.BV, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}

    def compiled_for(self, kernel: str) -> dict:
        """The same, for one that works on chunks."""
        return {
            **self.options(kernel),
            "KEY_GATE": self.log_f is not None,
            "VALUE_GATE": self.log_z is not None,
            "CHUNK": CHUNK,
            "PRECISION": self.precision(kernel),
        }

    def precision(self, kernel: str) -> str:
        """Of products."""
        is_bfloat16 = {self.q.dtype, self.k.dtype, self.v.dtype} == {torch.bfloat16}
        return self.launch(kernel).precision if is_bfloat16 else "tf32x3"

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


def _exact() -> Any:
    """The module of those for strong gates."""
    from . import gpu_exact

    return gpu_exact


def _side(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


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


def _chunks(q: Tensor, cu_seqlens: Tensor | None) -> _Chunks:
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return _even_chunks(B, T, q.device)
    # So many at most: how many there are is known on the GPU alone.
    return _cut(cu_seqlens.long(), T // CHUNK + len(cu_seqlens) - 1)


@lru_cache(maxsize=64)
def _even_chunks(B: int, T: int, device: torch.device) -> _Chunks:
    return _cut(torch.arange(B + 1, device=device) * T, B * -(-T // CHUNK))


def _cut(bounds: Tensor, M: int) -> _Chunks:
    counts = (bounds.diff() + CHUNK - 1) // CHUNK
    ends = counts.cumsum(0)
    chunks = torch.arange(M, device=bounds.device)
    sequence = torch.searchsorted(ends, chunks, right=True)
    needed = sequence < len(counts)
    sequence = sequence.clamp(max=len(counts) - 1)
    start = bounds[sequence] + (chunks - (ends - counts)[sequence]) * CHUNK
    return _Chunks(
        starts=torch.where(needed, start, 0),
        ends=torch.where(needed, bounds[1:][sequence], 0),
        sequence_starts=torch.where(needed, bounds[sequence], -1),
        sequences=sequence,
        first=ends - counts,
        counts=counts,
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [size for x in tensors for size in x.stride()]


def _or_zeros(state: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if state is None else state.contiguous()


class _States(NamedTuple):
    """What the chunks leave behind."""

    before: Float[Tensor, "M G K V"]
    """The state before each chunk."""
    F: Float[Tensor, "M G K"]
    """What a chunk leaves of the state before it, by key."""
    Z: Float[Tensor, "M G V"]
    """The same by value."""
    strong: Int[Tensor, "M G"]
    """Not 0 for a chunk that is left to the exact kernels."""
    final: Float[Tensor, "N G K V"]


def _states(p: _Problem, c: _Chunks, initial_state: Tensor | None) -> _States:
    (_, G, _, K, V), M = p.sizes, len(c.starts)
    s = _States(
        before=p.new(M, G, K, V),
        F=p.new(M, G, K),
        Z=p.new(M, G, V),
        strong=torch.full((M, G), int(not p.is_narrow), dtype=torch.int32, device=p.q.device),
        final=p.new(p.N, G, K, V),
    )
    if M:
        _kernels().written[(M, G, prod(p.tiles("written")))](
            p.k, p.v, *p.gates, c.starts, c.ends, s.before, s.F, s.Z, s.strong,
            *_strides(p.k, p.v, *p.gates), G, K, V,
            LIMIT=LIMITS[p.precision("outputs")], **p.compiled_for("written"),
        )  # fmt: skip
    _scan(p, c, s.before, s, _or_zeros(initial_state, s.final), s.final, back=False)
    return s


def _scan(p: _Problem, c: _Chunks, states: Tensor, s: _States, before: Tensor, after: Tensor, back: bool) -> None:
    _, G, _, K, V = p.sizes
    if p.N:
        _kernels().scan[(p.N, G, prod(p.tiles("scan")))](
            states, s.F, s.Z, c.first, c.counts, before, after, G, K, V, BACK=back,
            STAGES=p.launch("scan").num_stages, **p.options("scan"),
        )  # fmt: skip


def _pairs(
    p: _Problem, c: _Chunks, s: _States, x: Tensor, y: Tensor, log_gate: Tensor | None, scale: float, side: int
) -> Tensor:
    """What x reads of y within each sub-chunk with strong gates: (tokens, H, SUB)."""
    H, G, R = p.sizes[:3]
    A, gate = p.new(len(x), H, SUB), p.q if log_gate is None else log_gate
    _exact().pairs[(len(c.starts), H)](
        x, y, gate, s.strong, c.starts, c.ends, A, *_strides(x, y, gate), H, G, R, x.shape[2], scale,
        GATED=log_gate is not None, SHIFT=p.shift, CHUNK=CHUNK, SUB=SUB, BD=side,
    )  # fmt: skip
    return A


def _parts(whole: Tensor, count: int) -> Tensor:
    """Where exact kernels write the parts of a sum, one for each tile: into the whole, if there is one tile."""
    return whole if count == 1 else whole.new_empty((count, *whole.shape), dtype=torch.float32)


def _join(p: _Problem, c: _Chunks, s: _States, parts: Tensor, whole: Tensor, shift: int) -> None:
    """Sum up the parts of strong chunks' tokens."""
    if parts is whole:
        return
    (H, D), side, G, M = whole.shape[1:], 32, p.sizes[1], len(c.starts)
    _exact().join[(M, H, -(-D // side))](
        parts, whole, s.strong, c.starts, c.ends, c.sequence_starts, len(parts), len(p.q), H, G, H // G, D,
        SHIFT=shift, CHUNK=CHUNK, BD=side,
    )  # fmt: skip


def _empty_outputs(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = v.new_empty((N, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return v.new_empty((*q.shape[:3], v.shape[3])), final_state


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
    p = _problem(q, k, v, log_f, log_z, cu_seqlens, scale, inclusive)
    if q.shape[1] == 1 and cu_seqlens is None and len(q):
        return _step(p, initial_state, *_empty_outputs(q, v, None))
    c = _chunks(q, cu_seqlens)
    s = _states(p, c, initial_state)
    H, G, R, K, V = p.sizes
    M, o = len(c.starts), v.new_empty((len(p.q), H, V))
    strides = _strides(p.q, p.k, p.v, *p.gates)
    if M and p.is_narrow:
        _kernels().outputs[(M, H, 2 * p.tiles("outputs")[1])](
            p.q, p.k, p.v, *p.gates, s.before, s.strong, c.starts, c.ends, c.sequence_starts, o,
            *strides, H, G, R, K, V, scale, SHIFT=p.shift, **p.compiled_for("outputs"),
        )  # fmt: skip
    if M and p.may_be_strong:
        A = _pairs(p, c, s, p.q, p.k, p.log_f, scale, p.launch("exact").BK)
        parts = _parts(o, p.tiles("exact")[0])
        _exact().exact_outputs[(M, H, prod(p.tiles("exact")))](
            p.q, p.k, p.v, *p.gates, A, s.before, s.strong, c.starts, c.ends, c.sequence_starts, parts,
            *strides, len(p.q), H, G, R, K, V, scale, SHIFT=p.shift, SUB=SUB, **p.compiled_for("exact"),
        )  # fmt: skip
        _join(p, c, s, parts, o, p.shift)
    return o.view(*q.shape[:3], V), s.final


@_forward_op.register_fake
def _(q, k, v, log_f, log_z, initial_state, cu_seqlens, scale, inclusive):
    return _empty_outputs(q, v, cu_seqlens)


def _step(p: _Problem, initial_state: Tensor | None, o: Tensor, final_state: Tensor) -> tuple[Tensor, Tensor]:
    H, G, R, K, V = p.sizes
    before = _or_zeros(initial_state, final_state)
    _kernels().step[(p.N, G, p.tiles("step")[1])](
        p.q, p.k, p.v, *p.gates, before, o, final_state, *_strides(p.q, p.k, p.v, *p.gates), H, G, R, K, V, p.scale,
        KEY_GATE=p.log_f is not None, VALUE_GATE=p.log_z is not None, SHIFT=p.shift,
        READERS=1 << (R - 1).bit_length(), **p.options("step"),
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
    p, c = _problem(q, k, v, log_f, log_z, cu_seqlens, scale, inclusive), _chunks(q, cu_seqlens)
    s = _states(p, c, initial_state)
    H, G, R, K, V = p.sizes
    M, tokens = len(c.starts), len(p.q)
    given = p.new(1, 1, 1).zero_().expand(tokens, H, V) if do is None else do.flatten(0, 1)
    dstates, dinitial = torch.empty_like(s.before), torch.empty_like(s.final)
    if M:
        _kernels().read_back[(M, G, prod(p.tiles("read_back")))](
            p.q, given, *p.gates, c.starts, c.ends, c.sequence_starts, dstates,
            *_strides(p.q, given, *p.gates), G, R, K, V, scale, SHIFT=p.shift, **p.compiled_for("read_back"),
        )  # fmt: skip
    _scan(p, c, dstates, s, dinitial, _or_zeros(dfinal, s.final), back=True)
    dq, dk, dv = (x.new_empty((tokens, *x.shape[2:])) for x in (q, k, v))
    dlog_f, dlog_z = _empty_gradient(log_f, dk), _empty_gradient(log_z, dv)
    inputs, strides = (p.q, p.k, p.v, *p.gates, given), _strides(p.q, p.k, p.v, *p.gates, given)
    if M and p.is_narrow:
        of_keys, of_values = (p.q, p.k, p.gates[0]), (given, p.v, p.gates[1])
        shared = (
            s.before, dstates, s.final, dinitial, s.strong, c.starts, c.ends, c.sequences, c.sequence_starts,
        )  # fmt: skip
        options, (key_tiles, value_tiles) = p.compiled_for("gradients"), p.tiles("gradients")
        gates, (BK, BV) = (options.pop("KEY_GATE"), options.pop("VALUE_GATE")), (options.pop("BK"), options.pop("BV"))
        _kernels().gradients[(M, G, 2 * key_tiles)](
            *of_keys, *of_values, *shared, dq, dk, dlog_f, *_strides(*of_keys, *of_values), H, G, R, K, V, V, 1,
            scale, 1.0, GATED=gates[0], FAR_GATED=gates[1], READERS=True, SHIFT=p.shift,
            BD=BK, BE=_side(V), **options,
        )  # fmt: skip
        _kernels().gradients[(M, G, 2 * value_tiles)](
            *of_values, *of_keys, *shared, dv, dv, dlog_z, *_strides(*of_values, *of_keys), H, G, R, V, K, 1, V,
            1.0, scale, GATED=gates[1], FAR_GATED=gates[0], READERS=False, SHIFT=p.shift,
            BD=BV, BE=_side(K), **options,
        )  # fmt: skip
    if M and p.may_be_strong:
        chosen, (key_tiles, value_tiles) = p.launch("exact"), p.tiles("exact")
        A = _pairs(p, c, s, p.q, p.k, p.log_f, scale, chosen.BK)
        B = _pairs(p, c, s, given, p.v, p.log_z, 1.0, chosen.BV)
        wholes = (dq, dk, dv, dlog_f, dlog_z)
        counts = (value_tiles, value_tiles, key_tiles, value_tiles, key_tiles)
        parts = [_parts(whole, count) for whole, count in zip(wholes, counts, strict=True)]
        _exact().exact_gradients[(M, G, key_tiles * value_tiles)](
            *inputs, A, B, s.before, dstates, s.strong, c.starts, c.ends, c.sequence_starts,
            *parts, *strides, tokens, H, G, R, K, V, scale, SHIFT=p.shift, SUB=SUB, **p.compiled_for("exact"),
        )  # fmt: skip
        gradients = zip(parts, wholes, (p.shift, 0, 0, 0, 0), (True, True, True, p.log_f, p.log_z), strict=True)
        for part, whole, shift, there in gradients:
            if there is not None:
                _join(p, c, s, part, whole, shift)
    results = [_as_given(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v), (dlog_f, log_f), (dlog_z, log_z))]
    return *results, dinitial  # type: ignore[return-value]


def _empty_gradient(gate: Tensor | None, like: Tensor) -> Tensor:
    """For the gradient of a gate by channel; float32 if that of a gate for each head is to be their sum."""
    if gate is None:
        return like  # which is not written
    return torch.empty_like(like, dtype=gate.dtype if gate.shape[-1] == like.shape[-1] else torch.float32)


def _as_given(dx: Tensor, x: Tensor | None) -> Tensor:
    """The gradient of x in its shape; that of a gate for each head is the sum over its channels."""
    if x is None:
        return dx.new_empty((0,), dtype=torch.float32)
    if x.shape[-1] != dx.shape[-1]:
        dx = dx.sum(-1, keepdim=True)
    return dx.view(x.shape).to(x.dtype)


@_backward_op.register_fake
def _(do, dfinal, q, k, v, log_f, log_z, initial_state, cu_seqlens, scale, inclusive):
    gradients = [
        q.new_empty((0,), dtype=torch.float32) if x is None else torch.empty_like(x) for x in (q, k, v, log_f, log_z)
    ]
    return *gradients, _empty_outputs(q, v, cu_seqlens)[1]


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
