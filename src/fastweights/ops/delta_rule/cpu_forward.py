"""Forward kernel of the delta rule on CPUs.

Token by token, with the value columns of a tile, which are independent of all others, in the first-level cache. One
pass over the tile does all of a token's work: it decays and writes, reads with q, and recalls with the next token's k,

    e_t = v_t - a_t p_t      S_t = a_t S_{t-1} + k_t (b_t e_t)^T      o_t = S_t^T q_t      p_{t+1} = S_t^T k_{t+1}

Sums are added up in one order wherever a block begins, so neither a later token nor padding changes one bit of the
result.

Notation
    R        query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    S        state: tile after tile, each of rows of COLUMNS numbers for each of Kp keys
    a, b     decay and writing strength
    p        what the state before gives for a token's key
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from numba import float32, float64, int64, njit, types
from numba.extending import register_jitable

from ..numba.checkpoints import SEGMENT
from ..numba.rows import clear
from ..numba.runtime import sources_version
from ..numba.staging import COLUMNS, part_width, round_up, stage, unstage
from ..numba.units import checkpoint_at, late_reads, stage_keys, stage_queries, stage_values, unit_at
from ..numba.vectors import LANES, fill, fma, inner, load, place, pointer, record_at, shift, splat, store
from .cpu_problem import Problem, errors_at, stage_beta, stage_decay

BLOCK = 16
"""Tokens that a tile stays in the cache for, at most."""


class Outputs(NamedTuple):
    """Addresses that the kernel writes: contiguous o (B, T, H, V) and state (N, G, K, V)."""

    o: int
    final_state: int


class Buffers(NamedTuple):
    """Scratch of the kernel: how many numbers each buffer has or, in the kernel, where it starts."""

    k: int
    q: int
    v: int
    o: int
    a: int
    b: int
    S: int


@register_jitable
def buffer_sizes(K, V, R, parts):
    """The kernel's buffers; each has whole vectors."""
    Kp, Vp = round_up(K, LANES), part_width(V, parts)
    return Buffers(
        k=(BLOCK + 1) * Kp,  # the last token recalls with the key after it
        q=R * BLOCK * Kp,
        v=BLOCK * Vp,
        o=R * BLOCK * Vp,
        a=BLOCK,
        b=BLOCK,
        S=Kp * Vp,
    )


@njit(nogil=True, forceinline=True)
def _read(S, q, Kp):
    """S^T q of a tile, added up in the order of `_write_and_read`."""
    zero = fill(float32(0.0))
    o00, o01, o10, o11 = zero, zero, zero, zero
    for key in range(0, Kp, 2):
        s = shift(S, key * COLUMNS)
        q0, q1 = splat(q, key), splat(q, key + 1)
        o00, o01 = fma(q0, load(s, 0), o00), fma(q0, load(s, LANES), o01)
        o10, o11 = fma(q1, load(s, COLUMNS), o10), fma(q1, load(s, COLUMNS + LANES), o11)
    return o00 + o10, o01 + o11


@inner
def _write_and_read(S, k, q, Kp, v, o, Vp, a, b, rows, R):
    """All tokens of a block for one tile; e takes the place of v."""
    zero = fill(float32(0.0))
    p0, p1 = _read(S, k, Kp)
    for t in range(rows):
        at, bt, j = splat(a, t), splat(b, t), t * Vp
        e0, e1 = load(v, j) - at * p0, load(v, j + LANES) - at * p1
        store(v, j, e0)
        store(v, j + LANES, e1)
        u0, u1 = bt * e0, bt * e1
        kt, kn, qt = shift(k, t * Kp), shift(k, (t + 1) * Kp), shift(q, t * Kp)
        o00, o01, o10, o11, p00, p01, p10, p11 = zero, zero, zero, zero, zero, zero, zero, zero
        for key in range(0, Kp, 2):
            s = shift(S, key * COLUMNS)
            x, y = splat(kt, key), splat(kt, key + 1)
            s00, s01 = fma(x, u0, at * load(s, 0)), fma(x, u1, at * load(s, LANES))
            s10, s11 = fma(y, u0, at * load(s, COLUMNS)), fma(y, u1, at * load(s, COLUMNS + LANES))
            store(s, 0, s00)
            store(s, LANES, s01)
            store(s, COLUMNS, s10)
            store(s, COLUMNS + LANES, s11)
            x, y = splat(qt, key), splat(qt, key + 1)
            o00, o01, o10, o11 = fma(x, s00, o00), fma(x, s01, o01), fma(y, s10, o10), fma(y, s11, o11)
            x, y = splat(kn, key), splat(kn, key + 1)
            p00, p01, p10, p11 = fma(x, s00, p00), fma(x, s01, p01), fma(y, s10, p10), fma(y, s11, p11)
        p0, p1 = p00 + p10, p01 + p11
        store(o, j, o00 + o10)
        store(o, j + LANES, o01 + o11)
        for r in range(1, R):
            o0, o1 = _read(S, shift(qt, r * BLOCK * Kp), Kp)
            store(o, r * BLOCK * Vp + j, o0)
            store(o, r * BLOCK * Vp + j + LANES, o1)


@inner
def _load_state(S, p, u, address, start):
    """S = the unit's columns of a state that starts there in a tensor of states."""
    for column in range(0, u.columns, COLUMNS):
        x, columns = shift(pointer(address), start + column), min(COLUMNS, u.columns - column)
        stage(shift(S, column * u.Kp), COLUMNS, COLUMNS, x, p.V, columns, p.K, float32(1.0))


@inner
def _store_state(S, p, u, address, start):
    """And back."""
    for column in range(0, u.columns, COLUMNS):
        x, columns = shift(pointer(address), start + column), min(COLUMNS, u.columns - column)
        unstage(x, p.V, columns, p.K, shift(S, column * u.Kp), COLUMNS)


@inner
def _output(p, out, u, r, token):
    """Where o of a token and the r-th query head is written."""
    row = (u.batch * p.T + token) * p.G + u.head
    return shift(pointer(out.o), (row * p.R + r) * p.V + u.column)


@inner
def _read_initial_state(p, out, b, u, scale):
    """The exclusive read of the first token."""
    single = late_reads(p)
    for r in range(p.R):
        stage_queries(b.q, p, u, r, u.start, single, scale)
        for column in range(0, u.Vp, COLUMNS):
            o0, o1 = _read(shift(b.S, column * u.Kp), b.q, u.Kp)
            store(b.o, column, o0)
            store(b.o, column + LANES, o1)
        unstage(_output(p, out, u, r, u.start), p.V, u.columns, single, b.o, u.Vp)


@inner
def _stage_block(p, b, u, token, rows, reads, scale):
    """k, v, a, b and q of a block."""
    stage_keys(b.k, p, u, token, rows)
    clear(shift(b.k, rows * u.Kp), u.Kp)
    stage_values(b.v, p, u, token, rows)
    stage_decay(b.a, p, u, token, rows, BLOCK)
    stage_beta(b.b, p, u, token, rows, BLOCK)
    for r in range(p.R):
        q = shift(b.q, r * BLOCK * u.Kp)
        stage_queries(q, p, u, r, token + late_reads(p), reads, scale)
        clear(shift(q, reads * u.Kp), (rows - reads) * u.Kp)


@inner
def _write_block(p, out, b, u, token, rows, reads):
    """o and, unless their address is 0, the errors."""
    for r in range(p.R):
        to = _output(p, out, u, r, token + late_reads(p))
        unstage(to, p.G * p.R * p.V, u.columns, reads, shift(b.o, r * BLOCK * u.Vp), u.Vp)
    if p.errors != 0:
        unstage(shift(pointer(p.errors), errors_at(p, u, token)), p.G * p.V, u.columns, rows, b.v, u.Vp)


@njit(nogil=True, error_model="numpy")
def _forward(problem, outputs, scratch, factor, first_unit, end_unit):
    """o, the final state and, unless their addresses are 0, checkpoints and errors, for some units; takes addresses."""
    p, out = record_at(problem, Problem), record_at(outputs, Outputs)
    b = place(pointer(scratch), buffer_sizes(p.K, p.V, p.R, p.parts), p.guard)
    scale = float32(factor)
    for index in range(first_unit, end_unit):
        u = unit_at(p, index)
        clear(b.S, u.Kp * u.Vp)
        if p.initial_state != 0:
            _load_state(b.S, p, u, p.initial_state, u.state)
        if late_reads(p) == 1 and u.start < u.end:
            _read_initial_state(p, out, b, u, scale)
        for token in range(u.start, u.end, BLOCK):
            if p.checkpoints != 0 and (token - u.start) % SEGMENT == 0:
                _store_state(b.S, p, u, p.checkpoints, checkpoint_at(p, u, (token - u.start) // SEGMENT))
            rows = min(BLOCK, u.end - token)
            reads = min(rows, u.end - token - late_reads(p))
            _stage_block(p, b, u, token, rows, reads, scale)
            for column in range(0, u.Vp, COLUMNS):
                S, v, o = shift(b.S, column * u.Kp), shift(b.v, column), shift(b.o, column)
                _write_and_read(S, b.k, b.q, u.Kp, v, o, u.Vp, b.a, b.b, rows, p.R)
            _write_block(p, out, b, u, token, rows, reads)
        _store_state(b.S, p, u, out.final_state, u.state)


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def forward(problem, outputs, scratch, scale, first_unit, end_unit):
        _ = version
        _forward(problem, outputs, scratch, scale, first_unit, end_unit)

    return forward


forward = _compile(sources_version(Path(__file__).parent))
