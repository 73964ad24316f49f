"""Backward kernel of the delta rule on CPUs.

The forward kernel keeps S once every SEGMENT tokens, and the error e of each token. From the last segment to the first,
S is recomputed at every CHUNK tokens, and a chunk's gradients are products of S, dS and the chunk's rows, and of its
pairs of tokens. With u_i = b_i e_i, from the state S before the chunk,

    S_t = c_t S + sum_{i <= t} D_ti k_i u_i^T
    o_t = S_t^T q_t
    e_t = v_t - c_t S^T k_t - sum_{i < t} D_ti (k_i . k_t) u_i

So an error is one more read: with the query k_t, of tokens i < t, and with -dv_t for the gradient of what it reads,
where dv_t = b_t du_t. That is known from the last token to the first. The gradient of a log decay is the sum of all
paths across it, from a token or the state before the chunk to a read or the state after it. Nothing is divided or
subtracted, so strong decay costs no accuracy.

Notation
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    S, dS    state before the chunk and gradient of the state after it, rows of Vp numbers for each of Kp keys
    a, b     decay and writing strength
    D, c     decay from token to token of a chunk, and from the chunk's start to a token
    g        gradient of what is read: scale * do, or -dv
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from numba import float32, float64, int64, njit, types
from numba.extending import register_jitable

from ..numba.checkpoints import SEGMENT
from ..numba.products import CHUNK, decay_and_write, times_keys, times_values
from ..numba.rows import clear, dot, gather, spread
from ..numba.runtime import sources_version
from ..numba.segments import first_read_back, segment_at, stage_reads, write_query_gradients
from ..numba.staging import part_width, round_up, stage, unstage
from ..numba.units import checkpoint_at, late_reads, stage_keys, unit_at
from ..numba.vectors import LANES, fill, fma, inner, load, place, pointer, record_at, shift, splat, store
from .cpu_problem import Problem, errors_at, stage_beta, stage_decay


class Gradients(NamedTuple):
    """Addresses of the output gradients (0: none) and of what the kernel writes.

    All are contiguous. All but dv and dinitial have the parts as an additional first dimension.
    """

    do: int
    do_strides: tuple[int, int, int]
    dfinal: int
    dq: int
    dk: int
    dv: int
    dbeta: int
    dlog_decay: int
    dinitial: int
    tokens: int
    """B * T"""


class Buffers(NamedTuple):
    """Scratch of the kernel: how many numbers each buffer has or, in the kernel, where it starts."""

    k: int
    q: int
    dq: int
    e: int
    g: int
    a: int
    b: int
    states: int
    dS: int
    D: int
    u: int
    k_end: int
    u_end: int
    k_start: int
    dk: int
    du: int
    dv: int
    x: int
    row_k: int
    row_v: int
    pairs: int
    c: int
    from_state: int
    to_end: int
    weights: int
    dweights: int


@register_jitable
def buffer_sizes(K, V, R, parts):
    """The kernel's buffers: of a segment's tokens, of the states at its chunks, and of one chunk's tokens."""
    Kp, Vp = round_up(K, LANES), part_width(V, parts)
    return Buffers(
        k=SEGMENT * Kp,
        q=R * SEGMENT * Kp,
        dq=R * SEGMENT * Kp,
        e=SEGMENT * Vp,
        g=R * SEGMENT * Vp,
        a=SEGMENT,
        b=SEGMENT,
        states=SEGMENT // CHUNK * Kp * Vp,
        dS=Kp * Vp,
        D=CHUNK * CHUNK,
        u=CHUNK * Vp,
        k_end=CHUNK * Kp,
        u_end=CHUNK * Vp,
        k_start=CHUNK * Kp,
        dk=CHUNK * Kp,
        du=CHUNK * Vp,
        dv=CHUNK * Vp,
        x=CHUNK * Kp,
        row_k=Kp,
        row_v=Vp,
        pairs=CHUNK * CHUNK,
        c=CHUNK,
        from_state=CHUNK,
        to_end=CHUNK,
        weights=CHUNK,
        dweights=CHUNK,
    )


class Chunk(NamedTuple):
    """CHUNK tokens of a segment: where their rows start in scratch."""

    token: int
    """The first."""
    rows: int
    """Tokens that are there."""
    i: int
    j: int
    """Offset of the first token's row in buffers of keys and of values."""
    k: int
    a: int
    b: int
    S: int
    """The state before the chunk."""


@inner
def _chunk_at(b, u, s, first):
    """The segment's chunk that starts at its row `first`."""
    i, j = first * u.Kp, first * u.Vp
    S = shift(b.states, first // CHUNK * u.Kp * u.Vp)
    rows = min(CHUNK, s.rows - first)
    return Chunk(s.token + first, rows, i, j, shift(b.k, i), shift(b.a, first), shift(b.b, first), S)


# --- a segment's rows and states -------------------------------------------------------------------


@inner
def _stage_writes(p, b, u, s):
    """k, e, a and b. Tokens that the last chunk lacks are zeros with a decay of 1: they leave S and dS alone."""
    missing = s.staged - s.rows
    stage_keys(b.k, p, u, s.token, s.rows)
    clear(shift(b.k, s.rows * u.Kp), missing * u.Kp)
    e = shift(pointer(p.errors), errors_at(p, u, s.token))
    stage(b.e, u.Vp, u.Vp, e, p.G * p.V, u.columns, s.rows, float32(1.0))
    clear(shift(b.e, s.rows * u.Vp), missing * u.Vp)
    stage_decay(b.a, p, u, s.token, s.rows, SEGMENT)
    stage_beta(b.b, p, u, s.token, s.rows, SEGMENT)


@inner
def _scale_rows(out, scales, x, width):
    """out_t = scale_t * x_t for a chunk's tokens."""
    for t in range(CHUNK):
        w = splat(scales, t)
        for i in range(t * width, (t + 1) * width, LANES):
            store(out, i, w * load(x, i))


@inner
def _work_out_decay(p, b, u, c):
    """D, c, u, and keys and u decayed to the chunk's end."""
    product = float32(1.0)
    for t in range(CHUNK):
        product = product * c.a[t]
        b.c[t] = product
        for i in range(t):
            b.D[t * CHUNK + i] = b.D[(t - 1) * CHUNK + i] * c.a[t]
        b.D[t * CHUNK + t] = float32(1.0)
    to_end = shift(b.D, (CHUNK - 1) * CHUNK)
    _scale_rows(b.u, c.b, shift(b.e, c.j), u.Vp)
    _scale_rows(b.k_end, to_end, c.k, u.Kp)
    _scale_rows(b.u_end, to_end, b.u, u.Vp)
    for i in range(0, u.Kp, LANES):
        store(b.row_k, i, fill(product))


@inner
def _recompute_states(p, b, u, s):
    """S at the start of each chunk, from the checkpoint at the start of the segment."""
    size = u.Kp * u.Vp
    clear(b.states, size)
    x = shift(pointer(p.checkpoints), checkpoint_at(p, u, s.index))
    stage(b.states, u.Vp, u.Vp, x, p.V, u.columns, p.K, float32(1.0))
    for first in range(0, s.staged - CHUNK, CHUNK):
        c = _chunk_at(b, u, s, first)
        _work_out_decay(p, b, u, c)
        decay_and_write(shift(c.S, size), c.S, u.Kp, u.Vp, p.log_decay != 0, b.row_k, False, b.row_v, c.k, b.u_end)


# --- the gradients of a chunk ----------------------------------------------------------------------


@inner
def _from_later_state(p, b, u, c):
    """du, dk and paths to the end of the chunk, from dS after it; all sums start here."""
    times_keys(b.du, b.dS, u.Kp, u.Vp, b.k_end)
    times_values(b.dk, b.dS, u.Kp, u.Vp, b.u_end)
    for t in range(CHUNK):
        b.to_end[t] = dot(shift(b.du, t * u.Vp), shift(b.u, t * u.Vp), u.Vp)
        b.from_state[t] = float32(0.0)
    if p.log_decay != 0:
        b.from_state[CHUNK - 1] = b.c[CHUNK - 1] * dot(c.S, b.dS, u.Kp * u.Vp)
    clear(b.pairs, CHUNK * CHUNK)


@inner
def _read_back(b, u, c, decays, q, g, dq):
    """The gradients of a chunk's reads of the state before it: dq, paths from there, and what is added to dS.

    The first of these, which `decays`, also takes dS back over the decay of the chunk.
    """
    times_values(b.x, c.S, u.Kp, u.Vp, g)
    for t in range(CHUNK):
        w, row = splat(b.c, t), t * u.Kp
        for i in range(row, row + u.Kp, LANES):
            store(dq, i, fma(w, load(b.x, i), load(dq, i)))
        b.from_state[t] += b.c[t] * dot(shift(q, row), shift(b.x, row), u.Kp)
    _scale_rows(b.k_start, b.c, q, u.Kp)
    decay_and_write(b.dS, b.dS, u.Kp, u.Vp, decays, b.row_k, False, b.row_v, b.k_start, g)


@njit(nogil=True, forceinline=True)  # for each token, and its arguments are many
def _read_pairs_back(b, u, c, t, tokens, q, g, dq):
    """dq, dk_i and du_i from token t's read of what the chunk's first `tokens` tokens wrote."""
    for i in range(tokens):
        score, D = dot(q, shift(c.k, i * u.Kp), u.Kp), b.D[t * CHUNK + i]
        dscore = D * dot(g, shift(b.u, i * u.Vp), u.Vp)
        b.weights[i], b.dweights[i] = D * score, dscore
        b.pairs[t * CHUNK + i] += score * dscore
    spread(b.du, b.weights, g, tokens, u.Vp)
    spread(b.dk, b.dweights, q, tokens, u.Kp)
    gather(dq, b.dweights, c.k, tokens, u.Kp)


@inner
def _errors_back(p, d, b, u, c, at):
    """dbeta and dv, from the last token to the first, and gradients of the reads that errors are; du becomes -dv."""
    dbeta, zero = pointer(d.dbeta), fill(float32(0.0))
    for t in range(CHUNK - 1, -1, -1):
        row_k, row_v = t * u.Kp, t * u.Vp
        du, w = shift(b.du, row_v), splat(c.b, t)
        if t < c.rows:
            dbeta[at + t * p.G] = dot(du, shift(b.e, c.j + row_v), u.Vp)
        for i in range(0, u.Vp, LANES):
            dv = w * load(du, i)
            store(b.dv, row_v + i, dv)
            store(du, i, zero - dv)
        _read_pairs_back(b, u, c, t, t, shift(c.k, row_k), du, shift(b.dk, row_k))
    unstage(shift(pointer(d.dv), errors_at(p, u, c.token)), p.G * p.V, u.columns, c.rows, b.dv, u.Vp)


@inner
def _decay_gradients(p, d, b, u, c, at):
    """The sums of all paths across each token's decay."""
    dlog_decay = pointer(d.dlog_decay)
    for t in range(c.rows):
        paths = float32(0.0)
        for i in range(t):
            paths += b.to_end[i]
        for end in range(t, CHUNK):
            paths += b.from_state[end]
            for i in range(t):
                paths += b.pairs[end * CHUNK + i]
        dlog_decay[at + t * p.G] = paths


# --- units -----------------------------------------------------------------------------------------


@njit(nogil=True, error_model="numpy")
def _backward(problem, gradients, scratch, scale, first_unit, end_unit):
    """All gradients for some units, from the last segment of each sequence to its first; takes addresses.

    The loops are not functions of their own: LLVM would optimise the steps again at each level of calls.
    """
    p, d = record_at(problem, Problem), record_at(gradients, Gradients)
    b = place(pointer(scratch), buffer_sizes(p.K, p.V, p.R, p.parts), p.guard)
    for index in range(first_unit, end_unit):
        u = unit_at(p, index)
        clear(b.dS, u.Kp * u.Vp)
        if d.dfinal != 0:
            stage(b.dS, u.Vp, u.Vp, shift(pointer(d.dfinal), u.state), p.V, u.columns, p.K, float32(1.0))
        for segment in range(round_up(u.end - u.start, SEGMENT) // SEGMENT - 1, -1, -1):
            s = segment_at(p, u, segment)
            _stage_writes(p, b, u, s)
            stage_reads(p, d, b, u, s, float32(scale))
            clear(b.dq, p.R * SEGMENT * u.Kp)
            _recompute_states(p, b, u, s)
            for first in range(s.staged - CHUNK, -1, -CHUNK):
                c = _chunk_at(b, u, s, first)
                at = (u.part * d.tokens + u.batch * p.T + c.token) * p.G + u.head
                _work_out_decay(p, b, u, c)
                _from_later_state(p, b, u, c)
                for r in range(p.R):
                    i, j = r * SEGMENT * u.Kp + c.i, r * SEGMENT * u.Vp + c.j
                    decays = r == 0 and p.log_decay != 0
                    _read_back(b, u, c, decays, shift(b.q, i), shift(b.g, j), shift(b.dq, i))
                    for t in range(CHUNK):
                        row_k, row_v = i + t * u.Kp, j + t * u.Vp
                        _read_pairs_back(b, u, c, t, t + 1, shift(b.q, row_k), shift(b.g, row_v), shift(b.dq, row_k))
                _errors_back(p, d, b, u, c, at)
                _read_back(b, u, c, False, c.k, b.du, b.dk)
                if p.log_decay != 0:
                    _decay_gradients(p, d, b, u, c, at)
                unstage(shift(pointer(d.dk), at * p.K), p.G * p.K, p.K, c.rows, b.dk, u.Kp)
            write_query_gradients(p, d, b, u, s)
        if late_reads(p) == 1 and u.start < u.end:
            first_read_back(p, d, b, u, float32(scale))
        unstage(shift(pointer(d.dinitial), u.state), p.V, u.columns, p.K, b.dS, u.Vp)


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def backward(problem, gradients, scratch, scale, first_unit, end_unit):
        _ = version
        _backward(problem, gradients, scratch, scale, first_unit, end_unit)

    return backward


backward = _compile(sources_version(Path(__file__).parent))
