"""Matrix products of the backward kernels: of a state with the rows of one chunk, in tiles that stay in registers.

Notation
    K, V     key and value width, in scratch padded to Kp and Vp
    S        state: rows of Vp numbers for each of Kp keys
    F, Z     gates of the key side and of the value side over a whole chunk
    a, b     a chunk's rows of Kp and of Vp numbers
"""

from __future__ import annotations

from numba import float32, njit

from .staging import COLUMNS
from .vectors import LANES, fill, fma, inner, load, shift, splat, store, store_fours, totals

CHUNK = 8
"""Tokens in a chunk of the backward pass."""


@inner
def decay_and_write(out, S, Kp, Vp, gate_f, F, gate_z, Z, a, b):
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


@inner
def times_keys(out, S, Kp, Vp, a):
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


@inner
def times_values(out, S, Kp, Vp, b):
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
