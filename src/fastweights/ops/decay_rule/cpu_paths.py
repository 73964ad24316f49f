"""Gates along paths inside a chunk of the backward kernel, and the sums over paths that are the gates' gradients.

Notation
    K, V     key and value width, in scratch padded to Kp and Vp; `width` is either
    S, dS    state before the chunk and gradient of the state after it, rows of Vp numbers for each of K keys
    f, z     key-side and value-side gates, in [0, 1]; `gate` is either
    F, Z     products of f and z from the chunk's start to a token
"""

from __future__ import annotations

from numba import float32

from ..numba.products import CHUNK
from ..numba.rows import clear
from ..numba.vectors import LANES, fill, fma, inner, load, splat, store, total


@inner
def decay_to_end(out, product, x, gated, gate, width):
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


@inner
def decay_pairs(out, x, gate, width):
    """out[t, i] = x_i times the gates of tokens i + 1 to t, for i <= t."""
    step = CHUNK * width
    for c in range(0, width, LANES):
        for i in range(CHUNK):
            w = load(x, i * width + c)
            store(out, i * step + i * width + c, w)
            for t in range(i + 1, CHUNK):
                w = w * load(gate, t * width + c)
                store(out, t * step + i * width + c, w)


@inner
def gate_products(out, gated, gate, width):
    """out_t = product of the chunk's gates up to token t."""
    for i in range(0, width, LANES):
        product = fill(float32(1.0))
        for t in range(CHUNK):
            if gated:
                product = product * load(gate, t * width + i)
            store(out, t * width + i, product)


@inner
def paths_across(sum_k, sum_v, S, dS, K, Kp, Vp, F, gate_z, Z):
    """Paths from before the chunk to past its end: (F Z^T) * S * dS, its sums over values and over keys."""
    clear(sum_k, Kp)
    clear(sum_v, Vp)
    for key in range(K):
        d = splat(F, key)
        row = fill(float32(0.0))
        at = key * Vp
        for value in range(0, Vp, LANES):
            x = load(S, at + value) * d
            if gate_z:
                x = x * load(Z, value)
            x = x * load(dS, at + value)
            row = row + x
            store(sum_v, value, load(sum_v, value) + x)
        sum_k[key] = total(row)


@inner
def step_back(dlog_gate, later, xt, dx, gate, t, width):
    """dlog_gate_t = later paths + sum_i xt[t, i] * dx_i over i < t; then dx_i *= gate_t."""
    for c in range(0, width, LANES):
        w = load(later, c)
        d = load(gate, c)
        for i in range(t):
            x = load(dx, i * width + c)
            w = fma(load(xt, i * width + c), x, w)
            store(dx, i * width + c, x * d)
        store(dlog_gate, c, w)
