"""Backward kernel of the decay rule on CPUs.

S is kept once every SEGMENT tokens. From the last segment to the first, S is recomputed at every
CHUNK tokens, and a chunk's gradients are products of S, dS and the chunk's rows (`_columns`,
`_rows`, `_outer`) and of its pairs of tokens i <= t. Decay travels as a product of gates,

    kt[t, i] = k_i * f_{i+1} * ... * f_t          vt[t, i] = v_i * z_{i+1} * ... * z_t

and nothing is divided or subtracted, so strong decay costs no accuracy. While t runs backwards, dk_i
is the gradient of kt[t, i], and is multiplied by f_t to become that of kt[t-1, i]. The gradient of a
gate is the sum of all paths across it,

    d log f_t = sum_v P_t     d log z_t = sum_k P_t     P_t = (f_t z_t^T) * S_{t-1} * dS_t

taken apart into paths that start at a token of the chunk, sum_i kt[t, i] * dk_i, and paths that
start in the state before the chunk, which end at a token's read or go on past the chunk's end.

Notation
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    S, dS    state and its gradient, rows of V numbers for each of K keys
    f, z     key-side and value-side gates (not their logs)
    F, Z     products of f and z from the chunk's start to a token
    g        scale * do
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from numba import float32, float64, int64, njit, types
from numba.extending import register_jitable

from ..numba.checkpoints import SEGMENT
from ..numba.runtime import sources_version
from ..numba.staging import (
    COLUMNS,
    Problem,
    clear,
    fill_ones,
    multiply,
    offset,
    part_width,
    round_up,
    sequence,
    stage,
    stage_gate,
    stage_key_gate,
    unstage,
)
from ..numba.vectors import (
    LANES,
    fill,
    fma,
    load,
    place,
    pointer,
    record_at,
    shift,
    splat,
    store,
    store_fours,
    total,
    totals,
)

CHUNK = 8


class Gradients(NamedTuple):
    """Addresses of the output gradients (0: none) and of what the kernel writes.

    All are contiguous. dq, dk and df have the parts as an additional first dimension.
    """

    do: int
    do_strides: tuple[int, int, int]
    dfinal: int
    dq: int
    dk: int
    dv: int
    df: int
    dz: int
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


# --- matrix products --------------------------------------------------------------------------------


@njit(nogil=True)
def _outer(out, S, Kp, Vp, gate_f, F, gate_z, Z, a, b):
    """out = (F Z^T) * S + sum over a chunk's tokens of a_t b_t^T; `out` may be S itself."""
    for value in range(0, Vp, COLUMNS):
        for key in range(0, Kp, 4):
            s0 = shift(S, key * Vp + value)
            s1, s2, s3 = shift(s0, Vp), shift(s0, 2 * Vp), shift(s0, 3 * Vp)
            s00, s01, s10, s11 = load(s0, 0), load(s0, LANES), load(s1, 0), load(s1, LANES)
            s20, s21, s30, s31 = load(s2, 0), load(s2, LANES), load(s3, 0), load(s3, LANES)
            if gate_f:
                f0, f1, f2, f3 = splat(F, key), splat(F, key + 1), splat(F, key + 2), splat(F, key + 3)
                s00, s01, s10, s11 = s00 * f0, s01 * f0, s10 * f1, s11 * f1
                s20, s21, s30, s31 = s20 * f2, s21 * f2, s30 * f3, s31 * f3
            if gate_z:
                z0, z1 = load(Z, value), load(Z, value + LANES)
                s00, s01, s10, s11 = s00 * z0, s01 * z1, s10 * z0, s11 * z1
                s20, s21, s30, s31 = s20 * z0, s21 * z1, s30 * z0, s31 * z1
            for t in range(CHUNK):
                i, j = t * Kp + key, t * Vp + value
                b0, b1 = load(b, j), load(b, j + LANES)
                a0, a1, a2, a3 = splat(a, i), splat(a, i + 1), splat(a, i + 2), splat(a, i + 3)
                s00, s01 = fma(a0, b0, s00), fma(a0, b1, s01)
                s10, s11 = fma(a1, b0, s10), fma(a1, b1, s11)
                s20, s21 = fma(a2, b0, s20), fma(a2, b1, s21)
                s30, s31 = fma(a3, b0, s30), fma(a3, b1, s31)
            _store_tile(shift(out, key * Vp + value), Vp, s00, s01, s10, s11, s20, s21, s30, s31)


@njit(nogil=True)
def _rows(out, S, Kp, Vp, a):
    """out_t = S^T a_t for a chunk's tokens."""
    zero = fill(float32(0.0))
    for value in range(0, Vp, COLUMNS):
        for t in range(0, CHUNK, 4):
            o00, o01, o10, o11, o20, o21, o30, o31 = zero, zero, zero, zero, zero, zero, zero, zero
            x0 = shift(a, t * Kp)
            x1, x2, x3 = shift(x0, Kp), shift(x0, 2 * Kp), shift(x0, 3 * Kp)
            for key in range(Kp):
                j = key * Vp + value
                s0, s1 = load(S, j), load(S, j + LANES)
                a0, a1, a2, a3 = splat(x0, key), splat(x1, key), splat(x2, key), splat(x3, key)
                o00, o01 = fma(a0, s0, o00), fma(a0, s1, o01)
                o10, o11 = fma(a1, s0, o10), fma(a1, s1, o11)
                o20, o21 = fma(a2, s0, o20), fma(a2, s1, o21)
                o30, o31 = fma(a3, s0, o30), fma(a3, s1, o31)
            _store_tile(shift(out, t * Vp + value), Vp, o00, o01, o10, o11, o20, o21, o30, o31)


@njit(nogil=True, forceinline=True)
def _store_tile(out, width, s00, s01, s10, s11, s20, s21, s30, s31):
    store(out, 0, s00)
    store(out, LANES, s01)
    store(out, width, s10)
    store(out, width + LANES, s11)
    store(out, 2 * width, s20)
    store(out, 2 * width + LANES, s21)
    store(out, 3 * width, s30)
    store(out, 3 * width + LANES, s31)


@njit(nogil=True)
def _columns(out, S, Kp, Vp, b):
    """out_t = S b_t for a chunk's tokens."""
    zero = fill(float32(0.0))
    for key in range(0, Kp, 4):
        s0 = shift(S, key * Vp)
        s1, s2, s3 = shift(s0, Vp), shift(s0, 2 * Vp), shift(s0, 3 * Vp)
        for t in range(0, CHUNK, 2):
            o00, o10, o20, o30, o01, o11, o21, o31 = zero, zero, zero, zero, zero, zero, zero, zero
            b0 = shift(b, t * Vp)
            b1 = shift(b0, Vp)
            for value in range(0, Vp, LANES):
                x0, x1 = load(b0, value), load(b1, value)
                s = load(s0, value)
                o00, o01 = fma(s, x0, o00), fma(s, x1, o01)
                s = load(s1, value)
                o10, o11 = fma(s, x0, o10), fma(s, x1, o11)
                s = load(s2, value)
                o20, o21 = fma(s, x0, o20), fma(s, x1, o21)
                s = load(s3, value)
                o30, o31 = fma(s, x0, o30), fma(s, x1, o31)
            sums = totals(o00, o10, o20, o30, o01, o11, o21, o31)
            store_fours(out, t * Kp + key, (t + 1) * Kp + key, sums)


# --- rows -------------------------------------------------------------------------------------------


@njit(nogil=True)
def _dot(x, y, size):
    sum0, sum1 = fill(float32(0.0)), fill(float32(0.0))
    if size % COLUMNS != 0:
        size -= LANES
        sum1 = load(x, size) * load(y, size)
    for i in range(0, size, COLUMNS):
        sum0 = fma(load(x, i), load(y, i), sum0)
        sum1 = fma(load(x, i + LANES), load(y, i + LANES), sum1)
    return total(sum0 + sum1)


@njit(nogil=True)
def _add(out, x, size):
    """out += x"""
    for i in range(0, size, LANES):
        store(out, i, load(x, i) + load(out, i))


@njit(nogil=True)
def _spread(out, weights, x, rows, size):
    """out_u += weight_u * x"""
    for i in range(0, size, LANES):
        xi = load(x, i)
        for u in range(rows):
            store(out, u * size + i, fma(splat(weights, u), xi, load(out, u * size + i)))


@njit(nogil=True)
def _gather(out, weights, x, rows, size):
    """out += sum of weight_u * x_u"""
    for i in range(0, size, LANES):
        sum_ = load(out, i)
        for u in range(rows):
            sum_ = fma(splat(weights, u), load(x, u * size + i), sum_)
        store(out, i, sum_)


@njit(nogil=True)
def _add_product(out, x, y, size):
    """out += x * y"""
    for i in range(0, size, LANES):
        store(out, i, fma(load(x, i), load(y, i), load(out, i)))


@njit(nogil=True)
def _sum(x, size):
    s = fill(float32(0.0))
    for i in range(0, size, LANES):
        s = s + load(x, i)
    return total(s)


# --- gates inside a chunk ---------------------------------------------------------------------------


@njit(nogil=True)
def _decay_to_end(out, product, x, gated, gate, width):
    """out_t = x_t times the gates of the chunk's later tokens; product = that of all of its gates."""
    for i in range(0, width, LANES):
        w = fill(float32(1.0))
        for t in range(CHUNK - 1, -1, -1):
            j = t * width + i
            if gated:
                store(out, j, load(x, j) * w)
                w = w * load(gate, j)
            else:
                store(out, j, load(x, j))
        store(product, i, w)


@njit(nogil=True)
def _decay_pairs(out, x, gate, width):
    """out[t, i] = x_i times the gates of tokens i + 1 to t, for i <= t."""
    step = CHUNK * width
    for c in range(0, width, LANES):
        for i in range(CHUNK):
            w = load(x, i * width + c)
            store(out, i * step + i * width + c, w)
            for t in range(i + 1, CHUNK):
                w = w * load(gate, t * width + c)
                store(out, t * step + i * width + c, w)


@njit(nogil=True)
def _products(out, gated, gate, width):
    """out_t = product of the chunk's gates up to token t."""
    for i in range(0, width, LANES):
        product = fill(float32(1.0))
        for t in range(CHUNK):
            if gated:
                product = product * load(gate, t * width + i)
            store(out, t * width + i, product)


@njit(nogil=True)
def _paths_across(sum_k, sum_v, S, dS, K, Kp, Vp, F, gate_z, Z):
    """Paths from before the chunk to past its end: (F Z^T) * S * dS, its sums over values and over keys."""
    clear(sum_k, Kp)
    clear(sum_v, Vp)
    for key in range(K):
        d = splat(F, key)
        row = fill(float32(0.0))
        at = key * Vp
        for value in range(0, Vp, LANES):
            x = load(S, at + value) * load(dS, at + value) * d
            if gate_z:
                x = x * load(Z, value)
            row = row + x
            store(sum_v, value, load(sum_v, value) + x)
        sum_k[key] = total(row)


@njit(nogil=True)
def _step_back(dgate, later, xt, dx, gate, t, width):
    """d log gate_t = later paths + sum_i xt[t, i] * dx_i over i < t; then dx_i *= gate_t."""
    for c in range(0, width, LANES):
        w = load(later, c)
        d = load(gate, c)
        for i in range(t):
            x = load(dx, i * width + c)
            w = fma(load(xt, i * width + c), x, w)
            store(dx, i * width + c, x * d)
        store(dgate, c, w)


@njit(nogil=True, error_model="numpy")
def _backward(problem, gradients, scratch, scale, first_unit, end_unit):
    """All gradients for some units, from the last segment of each sequence to its first; takes addresses."""
    p, d = record_at(problem, Problem), record_at(gradients, Gradients)
    K, V, R = p.K, p.V, p.R
    H = p.G * R
    value_gate = p.Vz == V
    key_gate = p.Kf > 0 or (p.Vz == 1 and V != 1)
    gated = key_gate or value_gate
    # An exclusive read of token t is an inclusive one of token t - 1, and one of the initial state.
    late = 1 - p.inclusive
    single = late + p.inclusive  # 1, but no literal: Numba would compile `unstage` again for it
    most_columns = part_width(V, p.parts)
    factor, one = float32(scale), float32(1.0)

    Kp = round_up(K, LANES)
    b = place(pointer(scratch), buffer_sizes(K, V, R, p.parts), p.guard)
    k, f, q, dq, v, z, g, states, dS, kt, vt = b.k, b.f, b.q, b.dq, b.v, b.z, b.g, b.states, b.dS, b.kt, b.vt
    F, Z, qF, gZ, dk, dv, x, y = b.F, b.Z, b.qF, b.gZ, b.dk, b.dv, b.x, b.y
    read_k, read_v, later_k, later_v, row_k, row_v = b.read_k, b.read_v, b.later_k, b.later_v, b.row_k, b.row_v
    weights, dweights = b.weights, b.dweights

    for unit in range(first_unit, end_unit):
        part, head, n = unit % p.parts, unit // p.parts % p.G, unit // p.parts // p.G
        column = part * most_columns
        columns = min(most_columns, V - column)
        Vp = round_up(columns, COLUMNS)
        batch, start, end, checkpoint = sequence(p, n)
        row = batch * p.T
        state = (n * p.G + head) * K * V + column
        clear(dS, Kp * Vp)
        if d.dfinal != 0:
            stage(dS, Vp, Vp, shift(pointer(d.dfinal), state), V, columns, K, one)

        for segment in range((end - start + SEGMENT - 1) // SEGMENT - 1, -1, -1):
            t0 = start + segment * SEGMENT
            rows = min(SEGMENT, end - t0)
            reads = min(rows, end - t0 - late)
            chunks = (rows + CHUNK - 1) // CHUNK
            # Tokens that the last chunk lacks are zeros with gates of 1: they leave S and dS alone.
            staged = chunks * CHUNK
            clear(shift(k, rows * Kp), (staged - rows) * Kp)
            clear(shift(v, rows * Vp), (staged - rows) * Vp)
            at = offset(p.k_strides, batch, t0, head)
            stage(k, Kp, Kp, shift(pointer(p.k), at), p.k_strides[1], K, rows, one)
            at = offset(p.v_strides, batch, t0, head) + column
            stage(v, Vp, Vp, shift(pointer(p.v), at), p.v_strides[1], columns, rows, one)
            if key_gate:
                stage_key_gate(f, Kp, p, batch, head, t0, rows)
                fill_ones(shift(f, rows * Kp), (staged - rows) * Kp)
            if value_gate:
                at = offset(p.z_strides, batch, t0, head) + column
                stage_gate(z, Vp, shift(pointer(p.z), at), p.z_strides[1], columns, rows)
                fill_ones(shift(z, rows * Vp), (staged - rows) * Vp)
            for r in range(R):
                qr, gr = shift(q, r * SEGMENT * Kp), shift(g, r * SEGMENT * Vp)
                clear(shift(qr, reads * Kp), (staged - reads) * Kp)
                at = offset(p.q_strides, batch, t0 + late, head * R + r)
                stage(qr, Kp, Kp, shift(pointer(p.q), at), p.q_strides[1], K, reads, one)
                if d.do == 0:
                    clear(gr, staged * Vp)
                else:
                    clear(shift(gr, reads * Vp), (staged - reads) * Vp)
                    at = offset(d.do_strides, batch, t0 + late, head * R + r) + column
                    stage(gr, Vp, Vp, shift(pointer(d.do), at), d.do_strides[1], columns, reads, factor)

            clear(states, Kp * Vp)
            at = ((checkpoint + segment) * p.G + head) * K * V + column
            stage(states, Vp, Vp, shift(pointer(p.checkpoints), at), V, columns, K, one)
            for chunk in range(chunks - 1):
                _decay_to_end(kt, row_k, shift(k, chunk * CHUNK * Kp), key_gate, shift(f, chunk * CHUNK * Kp), Kp)
                _decay_to_end(vt, row_v, shift(v, chunk * CHUNK * Vp), value_gate, shift(z, chunk * CHUNK * Vp), Vp)
                S = shift(states, chunk * Kp * Vp)
                _outer(shift(S, Kp * Vp), S, Kp, Vp, key_gate, row_k, value_gate, row_v, kt, vt)

            for chunk in range(chunks - 1, -1, -1):
                here = min(CHUNK, rows - chunk * CHUNK)
                i0, j0 = chunk * CHUNK * Kp, chunk * CHUNK * Vp
                S = shift(states, chunk * Kp * Vp)
                fc, zc = shift(f, i0), shift(z, j0)
                # Without a gate, pair (t, i) is token i itself for every t.
                pair_k, step_k, pair_v, step_v = shift(k, i0), 0, shift(v, j0), 0
                if key_gate:
                    _decay_pairs(kt, pair_k, fc, Kp)
                    pair_k, step_k = kt, CHUNK * Kp
                if value_gate:
                    _decay_pairs(vt, pair_v, zc, Vp)
                    pair_v, step_v = vt, CHUNK * Vp
                _products(F, key_gate, fc, Kp)
                _products(Z, value_gate, zc, Vp)
                last_F, last_Z = shift(F, (CHUNK - 1) * Kp), shift(Z, (CHUNK - 1) * Vp)

                # From the state after the chunk.
                _columns(dk, dS, Kp, Vp, shift(pair_v, (CHUNK - 1) * step_v))
                _rows(dv, dS, Kp, Vp, shift(pair_k, (CHUNK - 1) * step_k))
                if gated:
                    _paths_across(later_k, later_v, S, dS, K, Kp, Vp, last_F, value_gate, last_Z)

                # Reads of the state before the chunk.
                clear(read_k, CHUNK * Kp)
                clear(read_v, CHUNK * Vp)
                for r in range(R):
                    i, j = r * SEGMENT * Kp + i0, r * SEGMENT * Vp + j0
                    qFr, gZr = shift(qF, r * CHUNK * Kp), shift(gZ, r * CHUNK * Vp)
                    multiply(qFr, shift(q, i), F, CHUNK * Kp)
                    multiply(gZr, shift(g, j), Z, CHUNK * Vp)
                    _columns(x, S, Kp, Vp, gZr)
                    multiply(shift(dq, i), F, x, CHUNK * Kp)
                    if key_gate:
                        _add_product(read_k, qFr, x, CHUNK * Kp)
                    if value_gate:
                        _rows(y, S, Kp, Vp, qFr)
                        _add_product(read_v, gZr, y, CHUNK * Vp)

                for t in range(here - 1, -1, -1):
                    kr, vr = shift(pair_k, t * step_k), shift(pair_v, t * step_v)
                    for r in range(R):
                        i, j = r * SEGMENT * Kp + i0 + t * Kp, r * SEGMENT * Vp + j0 + t * Vp
                        qt, gt, dqt = shift(q, i), shift(g, j), shift(dq, i)
                        for u in range(t + 1):
                            weights[u] = _dot(qt, shift(kr, u * Kp), Kp)
                            dweights[u] = _dot(gt, shift(vr, u * Vp), Vp)
                        _spread(dv, weights, gt, t + 1, Vp)
                        _spread(dk, dweights, qt, t + 1, Kp)
                        _gather(dqt, dweights, kr, t + 1, Kp)
                    token = row + t0 + chunk * CHUNK + t
                    if key_gate:
                        _add(later_k, shift(read_k, t * Kp), Kp)
                        _step_back(row_k, later_k, kr, dk, shift(fc, t * Kp), t, Kp)
                        at = (part * d.tokens + token) * p.G + head
                        if p.Kf == K:
                            unstage(shift(pointer(d.df), at * K), K, K, single, row_k, Kp)
                        else:
                            df = pointer(d.df)
                            df[at] = _sum(row_k, Kp)
                    if value_gate:
                        _add(later_v, shift(read_v, t * Vp), Vp)
                        _step_back(row_v, later_v, vr, dv, shift(zc, t * Vp), t, Vp)
                        at = (token * p.G + head) * V + column
                        unstage(shift(pointer(d.dz), at), V, columns, single, row_v, Vp)

                token = row + t0 + chunk * CHUNK
                at = ((part * d.tokens + token) * p.G + head) * K
                unstage(shift(pointer(d.dk), at), p.G * K, K, here, dk, Kp)
                at = (token * p.G + head) * V + column
                unstage(shift(pointer(d.dv), at), p.G * V, columns, here, dv, Vp)

                for r in range(R):
                    decay = r == 0
                    qFr, gZr = shift(qF, r * CHUNK * Kp), shift(gZ, r * CHUNK * Vp)
                    _outer(dS, dS, Kp, Vp, decay and key_gate, last_F, decay and value_gate, last_Z, qFr, gZr)

            for r in range(R):
                at = ((part * d.tokens + row + t0 + late) * H + head * R + r) * K
                unstage(shift(pointer(d.dq), at), H * K, K, reads, shift(dq, r * SEGMENT * Kp), Kp)

        if late == 1 and start < end:
            # `states` starts with the initial state, which the first token read.
            for r in range(R):
                at = offset(p.q_strides, batch, start, head * R + r)
                stage(row_k, Kp, Kp, shift(pointer(p.q), at), p.q_strides[1], K, late, one)
                clear(row_v, Vp)
                if d.do != 0:
                    at = offset(d.do_strides, batch, start, head * R + r) + column
                    x_ = shift(pointer(d.do), at)
                    stage(row_v, Vp, Vp, x_, d.do_strides[1], columns, late, factor)
                for key in range(K):
                    x[key] = _dot(shift(states, key * Vp), row_v, Vp)
                    _spread(shift(dS, key * Vp), shift(row_k, key), row_v, late, Vp)
                at = ((part * d.tokens + row + start) * H + head * R + r) * K
                unstage(shift(pointer(d.dq), at), H * K, K, late, x, Kp)
        unstage(shift(pointer(d.dinitial), state), V, columns, K, dS, Vp)


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def backward(problem, gradients, scratch, scale, first_unit, end_unit):
        _ = version
        _backward(problem, gradients, scratch, scale, first_unit, end_unit)

    return backward


backward = _compile(sources_version(Path(__file__).parent))
