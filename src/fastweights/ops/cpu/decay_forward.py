"""Forward kernel of the decay rule on CPUs.

A *unit* of work is one key/value head of one sequence, or some value columns of it: units touch
nothing of each other's, so any number of threads may share them out.

Token by token, so that neither padding nor a split of the sequence changes one bit of the result.
A tile of 4 x 16 numbers of S stays in registers for BLOCK tokens.

Notation
    R        query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    S        state, rows of V (or `width`) numbers for each of K keys
    f, z     key-side and value-side gates (not their logs)
"""

from __future__ import annotations

from typing import NamedTuple

from numba import float32, float64, int64, njit, types

from .staging import (
    COLUMNS,
    SEGMENT,
    Problem,
    clear,
    offset,
    part_width,
    round_up,
    sequence,
    sources_version,
    stage,
    stage_gate,
    stage_key_gate,
    unstage,
)
from .vectors import LANES, fill, fma, load, pointer, record_at, shift, splat, store

BLOCK = 16


class Outputs(NamedTuple):
    """Addresses that the kernel writes: contiguous o (B, T, H, V) and state (N, G, K, V)."""

    o: int
    final_state: int


def scratch_size(K: int, V: int, R: int) -> int:
    """Numbers of scratch that the kernel needs."""
    Kp, Vp = -(-K // LANES) * LANES, -(-V // COLUMNS) * COLUMNS
    return BLOCK * (R + 2) * (Kp + Vp) + Kp * Vp


def _make_tiles(key_gate: bool, value_gate: bool, grouped: bool):
    """The step S = (f z^T) * S + k v^T, o += S^T q for `rows` tokens, tile by tile.

    One function per kind of gate; `grouped` for several query heads, since the loop over them would
    cost a single one a third of its speed.
    """

    @njit(nogil=True, forceinline=True)
    def step(s0, s1, k, f, i, v0, v1, z0, z1):
        w = splat(k, i)
        if key_gate:
            d = splat(f, i)
            if value_gate:
                return fma(s0, d * z0, w * v0), fma(s1, d * z1, w * v1)
            return fma(s0, d, w * v0), fma(s1, d, w * v1)
        return fma(w, v0, s0), fma(w, v1, s1)

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
    def tiles(S, width, k, f, q, Kp, v, z, o, Vp, rows, R):
        for value in range(0, Vp, COLUMNS):
            for key in range(0, Kp, 4):
                s0 = shift(S, key * width + value)
                s1, s2, s3 = shift(s0, width), shift(s0, 2 * width), shift(s0, 3 * width)
                s00, s01, s10, s11 = load(s0, 0), load(s0, LANES), load(s1, 0), load(s1, LANES)
                s20, s21, s30, s31 = load(s2, 0), load(s2, LANES), load(s3, 0), load(s3, LANES)
                for t in range(rows):
                    i, j = t * Kp + key, t * Vp + value
                    v0, v1 = load(v, j), load(v, j + LANES)
                    z0, z1 = v0, v1
                    if value_gate:
                        z0, z1 = load(z, j), load(z, j + LANES)
                    s00, s01 = step(s00, s01, k, f, i, v0, v1, z0, z1)
                    s10, s11 = step(s10, s11, k, f, i + 1, v0, v1, z0, z1)
                    s20, s21 = step(s20, s21, k, f, i + 2, v0, v1, z0, z1)
                    s30, s31 = step(s30, s31, k, f, i + 3, v0, v1, z0, z1)
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


_no_gates = _make_tiles(False, False, False)
_key_gate = _make_tiles(True, False, False)
_both_gates = _make_tiles(True, True, False)
_key_gate_grouped = _make_tiles(True, False, True)
_both_gates_grouped = _make_tiles(True, True, True)


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
    # Kernels for a value gate alone, or for grouped heads without gates, are not worth compiling:
    # they get key gates of 1.
    value_gate = p.Vz == V
    key_gate = p.Kf > 0 or p.Vz > 0 or R > 1
    # An exclusive read of token t is an inclusive one of token t - 1, and one of the initial state.
    late = 1 - p.inclusive
    most_columns = part_width(V, p.parts)
    factor, one = float32(scale), float32(1.0)

    Kp, Vp = round_up(K, LANES), most_columns
    k = pointer(scratch)
    f = shift(k, BLOCK * Kp)
    q = shift(f, BLOCK * Kp)
    v = shift(q, R * BLOCK * Kp)
    z = shift(v, BLOCK * Vp)
    o = shift(z, BLOCK * Vp)
    padded_state = shift(o, R * BLOCK * Vp)

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

        for t in range(start, end, BLOCK):
            if p.checkpoints != 0 and (t - start) % SEGMENT == 0:
                at = ((checkpoint + (t - start) // SEGMENT) * p.G + head) * K * V + column
                unstage(shift(pointer(p.checkpoints), at), V, columns, K, S, width)
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
            if R == 1:
                if value_gate:
                    _both_gates(S, width, k, f, q, Kp, v, z, o, Vp, rows, R)
                elif key_gate:
                    _key_gate(S, width, k, f, q, Kp, v, z, o, Vp, rows, R)
                else:
                    _no_gates(S, width, k, f, q, Kp, v, z, o, Vp, rows, R)
            elif value_gate:
                _both_gates_grouped(S, width, k, f, q, Kp, v, z, o, Vp, rows, R)
            else:
                _key_gate_grouped(S, width, k, f, q, Kp, v, z, o, Vp, rows, R)
            for r in range(R):
                at = ((batch * p.T + t + late) * H + head * R + r) * V + column
                unstage(shift(pointer(out.o), at), H * V, columns, reads, shift(o, r * BLOCK * Vp), Vp)
        if not in_place:
            unstage(shift(pointer(out.final_state), state), V, columns, K, S, width)


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def forward(problem, outputs, scratch, scale, first_unit, end_unit):
        _ = version
        _forward(problem, outputs, scratch, scale, first_unit, end_unit)

    return forward


forward = _compile(sources_version())
