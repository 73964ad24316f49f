"""Backward kernel of the decay rule on CPUs.

S is kept once every SEGMENT tokens. From the last segment to the first, S is recomputed at every
CHUNK tokens, and a chunk's gradients are products of S, dS and the chunk's rows (`_columns`,
`_rows`, `_outer`) and of its pairs of tokens i <= t. Decay travels as a product of gates,

    kt[t, i] = k_i * f_{i+1} * ... * f_t          vt[t, i] = v_i * z_{i+1} * ... * z_t

and nothing is divided or subtracted, so strong decay costs no accuracy. While t runs backwards, dk_i
is the gradient of kt[t, i], and is multiplied by f_t to become that of kt[t-1, i]. The gradient of a
gate is the sum of all paths across it,

    dlog_f_t = sum_v P_t     dlog_z_t = sum_k P_t     P_t = (f_t z_t^T) * S_{t-1} * dS_t

taken apart into paths that start at a token of the chunk, sum_i kt[t, i] * dk_i (`step_back`), and
paths that start in the state before the chunk, which end at a token's read
(`_from_reads_of_earlier_state`) or go on past the chunk's end (`paths_across`).

Notation
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    S, dS    state and its gradient, rows of V numbers for each of K keys
    f, z     key-side and value-side gates, in [0, 1]; dlog_f, dlog_z the gradients of their logs
    F, Z     products of f and z from the chunk's start to a token
    P_t      all paths across step t, for each number of the state: what an earlier S gives to a later loss
    g        scale * do
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from numba import float32, float64, int64, njit, types
from numba.extending import register_jitable

from ..numba.checkpoints import SEGMENT
from ..numba.products import CHUNK, decay_and_write, times_keys, times_values
from ..numba.rows import add, add_product, clear, dot, fill_ones, gather, multiply, spread, sum_of
from ..numba.runtime import sources_version
from ..numba.segments import first_read_back, segment_at, stage_reads, write_query_gradients
from ..numba.staging import part_width, round_up, stage, unstage
from ..numba.units import checkpoint_at, late_reads, stage_keys, stage_values, unit_at
from ..numba.vectors import LANES, inner, place, pointer, record_at, shift
from .cpu_paths import decay_pairs, decay_to_end, gate_products, paths_across, step_back
from .cpu_problem import Problem, has_key_gate, has_value_gate, stage_key_gate, stage_value_gate


class Gradients(NamedTuple):
    """Addresses of the output gradients (0: none) and of what the kernel writes.

    All are contiguous. dq, dk and dlog_f have the parts as an additional first dimension.
    """

    do: int
    do_strides: tuple[int, int, int]
    dfinal: int
    dq: int
    dk: int
    dv: int
    dlog_f: int
    dlog_z: int
    dinitial: int
    tokens: int
    """B * T"""


class Buffers(NamedTuple):
    """Scratch of the kernel: how many numbers each buffer has or, in the kernel, where it starts."""

    k: int
    f: int
    q: int
    dq: int
    v: int
    z: int
    g: int
    states: int
    dS: int
    kt: int
    vt: int
    F: int
    Z: int
    qF: int
    gZ: int
    dk: int
    dv: int
    x: int
    y: int
    read_k: int
    read_v: int
    later_k: int
    later_v: int
    row_k: int
    row_v: int
    weights: int
    dweights: int


@register_jitable
def buffer_sizes(K, V, R, parts):
    """The kernel's buffers: of a segment's tokens, of the states at its chunks, and of one chunk's tokens."""
    Kp, Vp = round_up(K, LANES), part_width(V, parts)
    return Buffers(
        k=SEGMENT * Kp,
        f=SEGMENT * Kp,
        q=R * SEGMENT * Kp,
        dq=R * SEGMENT * Kp,
        v=SEGMENT * Vp,
        z=SEGMENT * Vp,
        g=R * SEGMENT * Vp,
        states=SEGMENT // CHUNK * Kp * Vp,
        dS=Kp * Vp,
        kt=CHUNK * CHUNK * Kp,
        vt=CHUNK * CHUNK * Vp,
        F=CHUNK * Kp,
        Z=CHUNK * Vp,
        qF=R * CHUNK * Kp,
        gZ=R * CHUNK * Vp,
        dk=CHUNK * Kp,
        dv=CHUNK * Vp,
        x=CHUNK * Kp,
        y=CHUNK * Vp,
        read_k=CHUNK * Kp,
        read_v=CHUNK * Vp,
        later_k=Kp,
        later_v=Vp,
        row_k=Kp,
        row_v=Vp,
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
    f: int
    z: int
    S: int
    """The state before the chunk."""
    kt: int
    vt: int
    step_k: int
    step_v: int
    """Pairs kt[t, i] and vt[t, i] of token t start at t * step_k and t * step_v; without gates they are k_i and v_i."""


@inner
def _chunk_at(p, b, u, s, first):
    """The segment's chunk that starts at its row `first`, with its pairs and products of gates worked out."""
    i, j = first * u.Kp, first * u.Vp
    f, z = shift(b.f, i), shift(b.z, j)
    kt, step_k, vt, step_v = shift(b.k, i), 0, shift(b.v, j), 0
    if has_key_gate(p):
        decay_pairs(b.kt, kt, f, u.Kp)
        kt, step_k = b.kt, CHUNK * u.Kp
    if has_value_gate(p):
        decay_pairs(b.vt, vt, z, u.Vp)
        vt, step_v = b.vt, CHUNK * u.Vp
    gate_products(b.F, has_key_gate(p), f, u.Kp)
    gate_products(b.Z, has_value_gate(p), z, u.Vp)
    S = shift(b.states, first // CHUNK * u.Kp * u.Vp)
    return Chunk(s.token + first, min(CHUNK, s.rows - first), i, j, f, z, S, kt, vt, step_k, step_v)


# --- a segment's rows and states -------------------------------------------------------------------


@inner
def _stage_writes(p, b, u, s):
    """k, v and gates. Tokens that the last chunk lacks are zeros with gates of 1: they leave S and dS alone."""
    missing = s.staged - s.rows
    stage_keys(b.k, p, u, s.token, s.rows)
    stage_values(b.v, p, u, s.token, s.rows)
    clear(shift(b.k, s.rows * u.Kp), missing * u.Kp)
    clear(shift(b.v, s.rows * u.Vp), missing * u.Vp)
    if has_key_gate(p):
        stage_key_gate(b.f, p, u, s.token, s.rows)
        fill_ones(shift(b.f, s.rows * u.Kp), missing * u.Kp)
    if has_value_gate(p):
        stage_value_gate(b.z, p, u, s.token, s.rows)
        fill_ones(shift(b.z, s.rows * u.Vp), missing * u.Vp)


@inner
def _recompute_states(p, b, u, s):
    """S at the start of each chunk, from the checkpoint at the start of the segment."""
    size = u.Kp * u.Vp
    clear(b.states, size)
    x = shift(pointer(p.checkpoints), checkpoint_at(p, u, s.index))
    stage(b.states, u.Vp, u.Vp, x, p.V, u.columns, p.K, float32(1.0))
    for first in range(0, s.staged - CHUNK, CHUNK):
        i, j = first * u.Kp, first * u.Vp
        decay_to_end(b.kt, b.row_k, shift(b.k, i), has_key_gate(p), shift(b.f, i), u.Kp)
        decay_to_end(b.vt, b.row_v, shift(b.v, j), has_value_gate(p), shift(b.z, j), u.Vp)
        S = shift(b.states, first // CHUNK * size)
        gate_f, gate_z = has_key_gate(p), has_value_gate(p)
        decay_and_write(shift(S, size), S, u.Kp, u.Vp, gate_f, b.row_k, gate_z, b.row_v, b.kt, b.vt)


# --- the gradients of a chunk ----------------------------------------------------------------------


@inner
def _from_later_state(p, b, u, c):
    """dk, dv and paths over the whole chunk, from dS after it."""
    last_k, last_v = shift(c.kt, (CHUNK - 1) * c.step_k), shift(c.vt, (CHUNK - 1) * c.step_v)
    times_values(b.dk, b.dS, u.Kp, u.Vp, last_v)
    times_keys(b.dv, b.dS, u.Kp, u.Vp, last_k)
    if has_key_gate(p) or has_value_gate(p):
        F, Z = shift(b.F, (CHUNK - 1) * u.Kp), shift(b.Z, (CHUNK - 1) * u.Vp)
        paths_across(b.later_k, b.later_v, c.S, b.dS, p.K, u.Kp, u.Vp, F, has_value_gate(p), Z)


@inner
def _from_reads_of_earlier_state(p, b, u, c):
    """dq of the chunk's reads of the state before it, and the paths that end at them."""
    size_k, size_v = CHUNK * u.Kp, CHUNK * u.Vp
    clear(b.read_k, size_k)
    clear(b.read_v, size_v)
    for r in range(p.R):
        i, j = r * SEGMENT * u.Kp + c.i, r * SEGMENT * u.Vp + c.j
        qF, gZ = shift(b.qF, r * size_k), shift(b.gZ, r * size_v)
        multiply(qF, shift(b.q, i), b.F, size_k)
        multiply(gZ, shift(b.g, j), b.Z, size_v)
        times_values(b.x, c.S, u.Kp, u.Vp, gZ)
        multiply(shift(b.dq, i), b.F, b.x, size_k)
        if has_key_gate(p):
            add_product(b.read_k, qF, b.x, size_k)
        if has_value_gate(p):
            times_keys(b.y, c.S, u.Kp, u.Vp, qF)
            add_product(b.read_v, gZ, b.y, size_v)


@njit(nogil=True, forceinline=True)  # for each token, and its arguments are many
def _from_pairs(p, b, u, c, t):
    """dq_t, dk_i and dv_i from the read of token t of what tokens i <= t of the chunk wrote."""
    kt, vt = shift(c.kt, t * c.step_k), shift(c.vt, t * c.step_v)
    for r in range(p.R):
        i, j = r * SEGMENT * u.Kp + c.i + t * u.Kp, r * SEGMENT * u.Vp + c.j + t * u.Vp
        q, g, dq = shift(b.q, i), shift(b.g, j), shift(b.dq, i)
        for n in range(t + 1):
            b.weights[n] = dot(q, shift(kt, n * u.Kp), u.Kp)
            b.dweights[n] = dot(g, shift(vt, n * u.Vp), u.Vp)
        spread(b.dv, b.weights, g, t + 1, u.Vp)
        spread(b.dk, b.dweights, q, t + 1, u.Kp)
        gather(dq, b.dweights, kt, t + 1, u.Kp)


@njit(nogil=True, forceinline=True)  # for each token, and its arguments are many
def _step_back_over_gates(p, d, b, u, c, t):
    """Gradients of the gates of token t, and dk_i and dv_i of earlier tokens taken back over them."""
    single = late_reads(p) + p.inclusive  # 1, but no literal: Numba would compile `unstage` again for it
    at = (u.batch * p.T + c.token + t) * p.G + u.head
    if has_key_gate(p):
        add(b.later_k, shift(b.read_k, t * u.Kp), u.Kp)
        step_back(b.row_k, b.later_k, shift(c.kt, t * c.step_k), b.dk, shift(c.f, t * u.Kp), t, u.Kp)
        dlog_f, part = pointer(d.dlog_f), u.part * d.tokens * p.G
        if p.Kf == p.K:
            unstage(shift(dlog_f, (part + at) * p.K), p.K, p.K, single, b.row_k, u.Kp)
        else:
            dlog_f[part + at] = sum_of(b.row_k, u.Kp)
    if has_value_gate(p):
        add(b.later_v, shift(b.read_v, t * u.Vp), u.Vp)
        step_back(b.row_v, b.later_v, shift(c.vt, t * c.step_v), b.dv, shift(c.z, t * u.Vp), t, u.Vp)
        unstage(shift(pointer(d.dlog_z), at * p.V + u.column), p.V, u.columns, single, b.row_v, u.Vp)


@inner
def _write_key_and_value_gradients(p, d, b, u, c):
    at = (u.batch * p.T + c.token) * p.G + u.head
    dk = shift(pointer(d.dk), (u.part * d.tokens * p.G + at) * p.K)
    unstage(dk, p.G * p.K, p.K, c.rows, b.dk, u.Kp)
    unstage(shift(pointer(d.dv), at * p.V + u.column), p.G * p.V, u.columns, c.rows, b.dv, u.Vp)


@inner
def _to_earlier_state(p, b, u):
    """dS before the chunk: decayed, and with what the chunk's reads add."""
    F, Z = shift(b.F, (CHUNK - 1) * u.Kp), shift(b.Z, (CHUNK - 1) * u.Vp)
    for r in range(p.R):
        gate_f, gate_z = r == 0 and has_key_gate(p), r == 0 and has_value_gate(p)
        qF, gZ = shift(b.qF, r * CHUNK * u.Kp), shift(b.gZ, r * CHUNK * u.Vp)
        decay_and_write(b.dS, b.dS, u.Kp, u.Vp, gate_f, F, gate_z, Z, qF, gZ)


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
            _recompute_states(p, b, u, s)
            for first in range(s.staged - CHUNK, -1, -CHUNK):
                c = _chunk_at(p, b, u, s, first)
                _from_later_state(p, b, u, c)
                _from_reads_of_earlier_state(p, b, u, c)
                for t in range(c.rows - 1, -1, -1):
                    _from_pairs(p, b, u, c, t)
                    _step_back_over_gates(p, d, b, u, c, t)
                _write_key_and_value_gradients(p, d, b, u, c)
                _to_earlier_state(p, b, u)
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
