"""Writes and reads of the forward kernel, with a tile of 4 x COLUMNS numbers of the state in registers.

Notation
    K, V     key and value width, in scratch padded to Kp and Vp
    S        state: rows of `width` numbers for each of Kp keys
    D, E     gates of the key side and of the value side that have yet to be made good on S
"""

from __future__ import annotations

from numba import njit

from ..numba.staging import COLUMNS
from ..numba.vectors import LANES, fma, inner, load, shift, splat, store

BLOCK = 16
"""Tokens that a tile stays in registers for, at most."""


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

    @inner
    def tiled(S, width, decays, D, E, k, q, Kp, v, o, Vp, rows, R):
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

    return tiled


tiles = _make_tiles(grouped=False)
tiles_of_groups = _make_tiles(grouped=True)
