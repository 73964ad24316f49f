"""Arithmetic on rows of scratch: whole vectors, pointers, no bounds.

Notation
    x, y, out   rows of `size` numbers, a multiple of LANES; x_u is the u-th of several rows one after the other
"""

from __future__ import annotations

from numba import float32

from .vectors import LANES, fill, fma, inner, load, splat, store, total


@inner
def clear(out, size):
    """out = 0"""
    zero = fill(float32(0.0))
    for i in range(0, size, LANES):
        store(out, i, zero)


@inner
def fill_ones(out, size):
    """out = 1"""
    one = fill(float32(1.0))
    for i in range(0, size, LANES):
        store(out, i, one)


@inner
def multiply(out, x, y, size):
    """out = x * y; `out` may be either of them"""
    for i in range(0, size, LANES):
        store(out, i, load(x, i) * load(y, i))


@inner
def copy(out, x, size):
    """out = x"""
    for i in range(0, size, LANES):
        store(out, i, load(x, i))


@inner
def divide(x, y, size):
    """x /= y"""
    for i in range(0, size, LANES):
        store(x, i, load(x, i) / load(y, i))


@inner
def dot(x, y, size):
    """The sum of x * y."""
    columns = 2 * LANES
    sum0, sum1 = fill(float32(0.0)), fill(float32(0.0))
    if size % columns != 0:
        size -= LANES
        sum1 = load(x, size) * load(y, size)
    for i in range(0, size, columns):
        sum0 = fma(load(x, i), load(y, i), sum0)
        sum1 = fma(load(x, i + LANES), load(y, i + LANES), sum1)
    return total(sum0 + sum1)


@inner
def add(out, x, size):
    """out += x"""
    for i in range(0, size, LANES):
        store(out, i, load(x, i) + load(out, i))


@inner
def spread(out, weights, x, rows, size):
    """out_u += weight_u * x"""
    for i in range(0, size, LANES):
        xi = load(x, i)
        for u in range(rows):
            store(out, u * size + i, fma(splat(weights, u), xi, load(out, u * size + i)))


@inner
def gather(out, weights, x, rows, size):
    """out += sum of weight_u * x_u"""
    for i in range(0, size, LANES):
        sum_ = load(out, i)
        for u in range(rows):
            sum_ = fma(splat(weights, u), load(x, u * size + i), sum_)
        store(out, i, sum_)


@inner
def add_product(out, x, y, size):
    """out += x * y"""
    for i in range(0, size, LANES):
        store(out, i, fma(load(x, i), load(y, i), load(out, i)))


@inner
def sum_of(x, size):
    """The sum of x."""
    s = fill(float32(0.0))
    for i in range(0, size, LANES):
        s = s + load(x, i)
    return total(s)
