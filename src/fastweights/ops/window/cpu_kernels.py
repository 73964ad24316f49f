"""The kernel of `softmax_backward_`; importing this compiles it (`runtime.load_kernels`).

A query sees keys that lie together, so that a row of logits has a part that counts and zeros around it. Whole vectors
are read and written: numbers before the part and after it count as -inf.

Notation
    x        a row of q·k, which becomes p, the weights
    d        a row of the weights' derivatives, which becomes that of q·k
    C        queries of a block, of each of the heads that share its keys
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llvmlite import ir
from numba import float32, float64, int64, njit, types
from numba.extending import register_jitable

from ..numba.runtime import sources_version
from ..numba.staging import round_up
from ..numba.vectors import (
    LANES,
    exp,
    fill,
    fma,
    inner,
    integer_at,
    intrinsic,
    load,
    load_short,
    place,
    pointer,
    record_at,
    store,
    store_short,
    total,
    vector,
)

_INT, _LONG = ir.IntType(32), ir.IntType(64)
_INTS, _LONGS = ir.VectorType(_INT, LANES), ir.VectorType(_LONG, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


class Problem(NamedTuple):
    """Sizes, and addresses of contiguous tensors."""

    logits: int
    derivatives: int
    logarithm: int
    share: int
    product: int
    index: int
    heads: int
    queries: int
    """Of a block, all heads that share its keys together."""
    block: int
    """C."""
    keys: int
    """Of a block; a multiple of LANES, of which the last C are its queries' own."""
    window: int
    short: int
    """Whether logits and derivatives are bf16, and not float32."""
    guard: int
    """Numbers in each guard of the scratch."""


class Results(NamedTuple):
    """None: all that is written is in place."""

    none: int


class Buffers(NamedTuple):
    """Scratch: how many numbers each buffer has or, in the kernel, where it starts."""

    p: int


@register_jitable
def buffer_sizes(keys):
    """Room for a row's weights."""
    return Buffers(p=round_up(keys, LANES))


@intrinsic
def _within(typingctx, value, i, first, end):
    """Of a vector at place i of a row, the numbers from `first` to `end`, and 0 elsewhere."""

    def codegen(context, builder, sig, args):
        value, i, first, end = args
        lanes = ir.Constant(_LONGS, list(range(LANES)))
        places = builder.add(_everywhere(builder, i), lanes)
        inside = builder.and_(
            builder.icmp_signed(">=", places, _everywhere(builder, first)),
            builder.icmp_signed("<", places, _everywhere(builder, end)),
        )
        return builder.select(inside, value, ir.Constant(_FLOATS, [0.0] * LANES))

    return vector(vector, types.intp, types.intp, types.intp), codegen


def _everywhere(builder, number):
    one = builder.insert_element(ir.Constant(_LONGS, ir.Undefined), number, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))


@inner
def _load(p, address, i):
    return load_short(address, i) if p.short else load(pointer(address), i)


@inner
def _store(p, address, i, value):
    if p.short:
        store_short(address, i, value)
    else:
        store(pointer(address), i, value)


@inner
def _clear(p, address, first, end):
    """Zeros, whole vectors of them."""
    zero = fill(float32(0.0))
    for i in range(first, end, LANES):
        _store(p, address, i, zero)


@inner
def _weigh(p, x, d, row, first, end, logarithm, scale):
    """e to the logits less their sum's logarithm, in scratch, zeros beside what is seen.

    Returns:
        What they add up to, and their product with d.
    """
    s, less, sums, products = fill(scale), fill(logarithm), fill(float32(0.0)), fill(float32(0.0))
    for i in range(first // LANES * LANES, end, LANES):
        weights, derivatives = exp(_load(p, x, i) * s - less), _load(p, d, i)
        if i < first or i + LANES > end:
            weights, derivatives = _within(weights, i, first, end), _within(derivatives, i, first, end)
        store(row, i, weights)
        sums, products = sums + weights, fma(weights, derivatives, products)
    return total(sums), total(products)


@inner
def _differentiate(p, x, d, row, first, end, factor, product, scale):
    """Write weights and derivatives of what is seen."""
    f, less, s = fill(factor), fill(product), fill(scale)
    for i in range(first // LANES * LANES, end, LANES):
        weights = load(row, i) * f
        derivatives = weights * (_load(p, d, i) - less) * s
        if i < first or i + LANES > end:
            derivatives = _within(derivatives, i, first, end)
        _store(p, x, i, weights)
        _store(p, d, i, derivatives)


@njit(nogil=True, error_model="numpy")
def _softmax_backward(problem, scratch, factor, first_row, end_row):
    p = record_at(problem, Problem)
    row = place(pointer(scratch), buffer_sizes(p.keys), p.guard).p
    scale, size = float32(factor), 2 if p.short else 4
    for r in range(first_row, end_row):
        block, query = r // p.queries // p.heads, r % p.queries % p.block
        index = integer_at(p.index, block * p.block + query)
        end = p.keys - p.block + query + 1 if index >= 0 else 0
        first = end - 1 - min(index, p.window - 1) if index >= 0 else 0
        x, d = p.logits + r * p.keys * size, p.derivatives + r * p.keys * size
        sums, product = _weigh(p, x, d, row, first, end, pointer(p.logarithm)[r], scale)
        factor_of_row = pointer(p.share)[r] / sums if end > 0 else float32(0.0)
        product = pointer(p.product)[r] + factor_of_row * product
        pointer(p.product)[r] = product
        _differentiate(p, x, d, row, first, end, factor_of_row, product, scale)
        _clear(p, x, 0, first // LANES * LANES)
        _clear(p, d, 0, first // LANES * LANES)
        _clear(p, x, round_up(end, LANES), p.keys)
        _clear(p, d, round_up(end, LANES), p.keys)


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def softmax_backward(problem, results, scratch, scale, first_row, end_row):
        _ = version
        _softmax_backward(problem, scratch, scale, first_row, end_row)

    return softmax_backward


softmax_backward = _compile(sources_version(Path(__file__).parent))
