"""Forward kernel of the decay rule on CPUs.

A *unit* of work is one key/value head of one sequence, or some value columns of it: units touch
nothing of each other's, so any number of threads may share them out.

Decay costs as many multiplications as writing and reading together, unless it is put off: with F_t
and Z_t the products of the gates since some token,

    S_t = (F_t Z_t^T) * T_t      T_t = T_{t-1} + (k_t / F_t) (v_t / Z_t)^T      o_t = Z_t * T_t^T (F_t * q_t)

so T only grows, and gates touch rows alone. A product that leaves [RESCALE_BELOW, 1 / RESCALE_BELOW] is made
good on T, and the products start anew at 1; which token that happens at depends on the gates up to
it alone, and padding, whose gates are 1, changes nothing. So neither a later token nor padding
changes one bit of the result. Token by token, a tile of 4 x COLUMNS numbers of T stays in registers for
up to BLOCK tokens.

Notation
    R        query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    S        state, and T above: rows of V (or `width`) numbers for each of K keys
    f, z     key-side and value-side gates (not their logs), then their products F and Z
    D, E     products that have yet to be made good on S
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
    choose_below,
    fill,
    fma,
    load,
    place,
    pointer,
    record_at,
    shift,
    splat,
    store,
    store_first,
    total,
)

BLOCK = 16
RESCALE_BELOW = 2.0**-16
"""Numbers in scratch are at most RESCALE_BELOW**-2 times those that they stand for: 4e9 of float32's 3e38."""


class Outputs(NamedTuple):
    """Addresses that the kernel writes: contiguous o (B, T, H, V) and state (N, G, K, V)."""

    o: int
    final_state: int


class Buffers(NamedTuple):
    """Scratch of the kernel: how many numbers each buffer has or, in the kernel, where it starts."""

    k: int
    f: int
    q: int
    v: int
    z: int
    o: int
    D: int
    F: int
    E: int
    Z: int
    padded_state: int


@register_jitable
def buffer_sizes(K, V, R, parts):
    """The kernel's buffers; each has whole vectors."""
    Kp, Vp = round_up(K, LANES), part_width(V, parts)
    return Buffers(
        k=BLOCK * Kp,
        f=BLOCK * Kp,
        q=R * BLOCK * Kp,
        v=BLOCK * Vp,
        z=BLOCK * Vp,
        o=R * BLOCK * Vp,
        D=Kp,
        F=Kp,
        E=Vp,
        Z=Vp,
        padded_state=Kp * Vp,
    )


def _make_tiles(grouped: bool):
    """S = (D E^T) * S, then S += k v^T and o += S^T q for `rows` tokens, tile by tile.

    `grouped` for several query heads, since the loop over them would cost a single one a third of its speed.
    """

    @njit(nogil=True, forceinline=True)
    def read(q, i, o, j, s00, s01, s10, s11, s20, s21, s30, s31):
        q0, q1, q2, q3 = splat(q, i), splat(q, i + 1), splat(q, i + 2), splat(q, i + 3)
        o0, o1 = load(o, j), load(o, j + LANES)
        o0, o1 = fma(q0, s00, o0), fma(q0, s01, o1)
        o0, o1 = fma(q1, s10, o0), fma(q1, s11, o1)
        o0, o1 = fma(q2, s20, o0), fma(q2, s21, o1)
        o0, o1 = fma(q3, s30, o0), fma(q3, s31, o1)
        store(o, j, o0)
        store(o, j + LANES, o1)

    @njit(nogil=True)
    def tiles(S, width, decays, D, E, k, q, Kp, v, o, Vp, rows, R):
        for value in range(0, Vp, COLUMNS):
            for key in range(0, Kp, 4):
                s0 = shift(S, key * width + value)
                s1, s2, s3 = shift(s0, width), shift(s0, 2 * width), shift(s0, 3 * width)
                s00, s01, s10, s11 = load(s0, 0), load(s0, LANES), load(s1, 0), load(s1, LANES)
                s20, s21, s30, s31 = load(s2, 0), load(s2, LANES), load(s3, 0), load(s3, LANES)
                if decays:
                    e0, e1 = load(E, value), load(E, value + LANES)
                    d0, d1, d2, d3 = splat(D, key), splat(D, key + 1), splat(D, key + 2), splat(D, key + 3)
                    s00, s01, s10, s11 = s00 * (d0 * e0), s01 * (d0 * e1), s10 * (d1 * e0), s11 * (d1 * e1)
                    s20, s21, s30, s31 = s20 * (d2 * e0), s21 * (d2 * e1), s30 * (d3 * e0), s31 * (d3 * e1)
                for t in range(rows):
                    i, j = t * Kp + key, t * Vp + value
                    v0, v1 = load(v, j), load(v, j + LANES)
                    k0, k1, k2, k3 = splat(k, i), splat(k, i + 1), splat(k, i + 2), splat(k, i + 3)
                    s00, s01, s10, s11 = fma(k0, v0, s00), fma(k0, v1, s01), fma(k1, v0, s10), fma(k1, v1, s11)
                    s20, s21, s30, s31 = fma(k2, v0, s20), fma(k2, v1, s21), fma(k3, v0, s30), fma(k3, v1, s31)
                    read(q, i, o, j, s00, s01, s10, s11, s20, s21, s30, s31)
                    if grouped:
                        for _ in range(1, R):
                            i += BLOCK * Kp
                            j += BLOCK * Vp
                            read(q, i, o, j, s00, s01, s10, s11, s20, s21, s30, s31)
                store(s0, 0, s00)
                store(s0, LANES, s01)
                store(s1, 0, s10)
                store(s1, LANES, s11)
                store(s2, 0, s20)
                store(s2, LANES, s21)
                store(s3, 0, s30)
                store(s3, LANES, s31)

    return tiles


_single = _make_tiles(grouped=False)
_grouped = _make_tiles(grouped=True)


@njit(nogil=True)
def _accumulate(product, gate, width, smallest):
    """gate = product * gate; whether a number of it has left [smallest, 1 / smallest], or is none."""
    low, high = fill(smallest), fill(float32(1.0) / smallest)
    zero, one = fill(float32(0.0)), fill(float32(1.0))
    outside = zero
    for i in range(0, width, LANES):
        x = load(product, i) * load(gate, i)
        outside = outside + choose_below(x, low, one, zero) + choose_below(high, x, one, zero) + (x - x)
        store(gate, i, x)
    return not total(outside) <= float32(0.0)  # x - x is NaN for NaN, which compares to nothing


@njit(nogil=True)
def _copy(out, x, width):
    for i in range(0, width, LANES):
        store(out, i, load(x, i))


@njit(nogil=True)
def _divide(x, y, width):
    """x /= y"""
    for i in range(0, width, LANES):
        store(x, i, load(x, i) / load(y, i))


@njit(nogil=True)
def _decay(out, stride, S, width, K, columns, D, E):
    """out = (D E^T) * S; `out` may be S itself."""
    whole = columns // LANES * LANES
    for key in range(K):
        d = splat(D, key)
        to, row = shift(out, key * stride), shift(S, key * width)
        for i in range(0, whole, LANES):
            store(to, i, load(row, i) * (d * load(E, i)))
        if whole < columns:
            store_first(to, whole, load(row, whole) * (d * load(E, whole)), columns - whole)


@njit(nogil=True)
def _run(S, width, decays, D, E, k, q, Kp, v, o, Vp, first, end, R):
    """The tiles for tokens `first` to `end` of a block."""
    i, j = first * Kp, first * Vp
    if R == 1:
        _single(S, width, decays, D, E, shift(k, i), shift(q, i), Kp, shift(v, j), shift(o, j), Vp, end - first, R)
    else:
        _grouped(S, width, decays, D, E, shift(k, i), shift(q, i), Kp, shift(v, j), shift(o, j), Vp, end - first, R)


@njit(nogil=True)
def _read(o, S, width, q, K, Vp):
    """o = S^T q, added up in the order of the tiles."""
    for value in range(0, Vp, LANES):
        total = fill(float32(0.0))
        for key in range(K):
            total = fma(splat(q, key), load(S, key * width + value), total)
        store(o, value, total)


@njit(nogil=True, error_model="numpy")
def _forward(problem, outputs, scratch, scale, first_unit, end_unit):
    """o, the final state and, unless their address is 0, the checkpoints, for some units; takes addresses."""
    p, out = record_at(problem, Problem), record_at(outputs, Outputs)
    K, V, R = p.K, p.V, p.R
    H = p.G * R
    value_gate = p.Vz == V
    key_gate = p.Kf > 0 or (p.Vz == 1 and V != 1)
    gated = key_gate or value_gate
    # An exclusive read of token t is an inclusive one of token t - 1, and one of the initial state.
    late = 1 - p.inclusive
    most_columns = part_width(V, p.parts)
    factor, one = float32(scale), float32(1.0)

    Kp = round_up(K, LANES)
    k, f, q, v, z, o, D, F, E, Z, padded_state = place(pointer(scratch), buffer_sizes(K, V, R, p.parts), p.guard)

    for unit in range(first_unit, end_unit):
        part, head, n = unit % p.parts, unit // p.parts % p.G, unit // p.parts // p.G
        column = part * most_columns
        columns = min(most_columns, V - column)
        Vp = round_up(columns, COLUMNS)
        batch, start, end, checkpoint = sequence(p, n)
        state = (n * p.G + head) * K * V + column
        S, width = shift(pointer(out.final_state), state), V
        in_place = K % LANES == 0 and columns % COLUMNS == 0
        if not in_place:
            S, width = padded_state, Vp
            clear(S, Kp * Vp)
        if p.initial_state != 0:
            stage(S, width, Vp, shift(pointer(p.initial_state), state), V, columns, K, one)
        else:
            for i in range(K):
                clear(shift(S, i * width), Vp)

        if late == 1 and start < end:
            for r in range(R):
                at = offset(p.q_strides, batch, start, head * R + r)
                stage(q, Kp, Kp, shift(pointer(p.q), at), p.q_strides[1], K, late, factor)
                _read(o, S, width, q, K, Vp)
                at = ((batch * p.T + start) * H + head * R + r) * V + column
                unstage(shift(pointer(out.o), at), H * V, columns, late, o, Vp)

        # Until the first token that decays, there is no product: one token alone needs but one pass over S.
        smallest, carried = one, False
        fill_ones(F, Kp)
        fill_ones(Z, Vp)
        fill_ones(D, Kp)
        fill_ones(E, Vp)
        for t in range(start, end, BLOCK):
            if p.checkpoints != 0 and (t - start) % SEGMENT == 0:
                at = ((checkpoint + (t - start) // SEGMENT) * p.G + head) * K * V + column
                _decay(shift(pointer(p.checkpoints), at), V, S, width, K, columns, F, Z)
            rows = min(BLOCK, end - t)
            reads = min(rows, end - t - late)
            at = offset(p.k_strides, batch, t, head)
            stage(k, Kp, Kp, shift(pointer(p.k), at), p.k_strides[1], K, rows, one)
            at = offset(p.v_strides, batch, t, head) + column
            stage(v, Vp, Vp, shift(pointer(p.v), at), p.v_strides[1], columns, rows, one)
            if key_gate:
                stage_key_gate(f, Kp, p, batch, head, t, rows)
            if value_gate:
                at = offset(p.z_strides, batch, t, head) + column
                x = shift(pointer(p.z), at)
                stage_gate(z, Vp, x, p.z_strides[1], columns, rows)
            for r in range(R):
                x, y = shift(q, r * BLOCK * Kp), shift(o, r * BLOCK * Vp)
                at = offset(p.q_strides, batch, t + late, head * R + r)
                stage(x, Kp, Kp, shift(pointer(p.q), at), p.q_strides[1], K, reads, factor)
                clear(shift(x, reads * Kp), (rows - reads) * Kp)
                clear(y, rows * Vp)
            first, decays = 0, False
            if gated:
                product_f, product_z = F, Z
                for i in range(rows):
                    ft, zt = shift(f, i * Kp), shift(z, i * Vp)
                    over = False
                    if key_gate:
                        over = _accumulate(product_f, ft, Kp, smallest)
                    if value_gate:
                        over = _accumulate(product_z, zt, Vp, smallest) or over
                    if over:
                        if first < i:
                            _run(S, width, decays, D, E, k, q, Kp, v, o, Vp, first, i, R)
                        first, decays, smallest = i, True, float32(RESCALE_BELOW)
                        if key_gate:
                            _copy(D, ft, Kp)
                            fill_ones(ft, Kp)
                        if value_gate:
                            _copy(E, zt, Vp)
                            fill_ones(zt, Vp)
                    carried = not over and (carried or smallest < one)
                    if key_gate:
                        product_f = ft
                        if carried:
                            _divide(shift(k, i * Kp), ft, Kp)
                            for r in range(R):
                                qt = shift(q, (r * BLOCK + i) * Kp)
                                multiply(qt, qt, ft, Kp)
                    if value_gate:
                        product_z = zt
                        if carried:
                            _divide(shift(v, i * Vp), zt, Vp)
                if key_gate:
                    _copy(F, product_f, Kp)
                if value_gate:
                    _copy(Z, product_z, Vp)
            _run(S, width, decays, D, E, k, q, Kp, v, o, Vp, first, rows, R)
            for r in range(R):
                x = shift(o, r * BLOCK * Vp)
                if value_gate:
                    multiply(x, x, z, reads * Vp)
                at = ((batch * p.T + t + late) * H + head * R + r) * V + column
                unstage(shift(pointer(out.o), at), H * V, columns, reads, x, Vp)
        if carried:
            _decay(S, width, S, width, K, columns, F, Z)
        if not in_place:
            unstage(shift(pointer(out.final_state), state), V, columns, K, S, width)


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def forward(problem, outputs, scratch, scale, first_unit, end_unit):
        _ = version
        _forward(problem, outputs, scratch, scale, first_unit, end_unit)

    return forward


forward = _compile(sources_version(Path(__file__).parent))
