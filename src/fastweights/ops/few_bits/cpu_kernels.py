"""Whole numbers of eight bits times those of four or eight; importing this compiles it (`runtime.load_kernels`).

A number of a row is step * (high + low / 254) with high and low from -127 to 127; one of the matrix is offset + scale *
(code - 8), or scale * (code - 128). So high * code and low * code of a group's inputs are summed exactly, in int32, by
one instruction for four inputs of each of the L outputs.

Notation: as in the package; a vector of L int32 has four bytes in each lane.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, float32, int32, njit, types
from numba.core import cgutils

from ..numba.runtime import sources_version
from ..numba.vectors import (
    LANES,
    broadcast,
    call_on_lanes,
    integers,
    intrinsic,
    pointer,
    record_at,
    take,
    whole_bytes,
)

_GROUP = 32
_ROWS = 4
"""That are multiplied at once where there are as many: codes are taken apart once for all of them."""
_inner: Any = njit(nogil=True, error_model="numpy", inline="never")
_PARTS = np.float32(254.0)
"""Of a step, in which what is left of a number is rounded."""
_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_VECTOR = 4 * LANES
"""Its bytes."""


class Record(NamedTuple):
    """What the kernels are given; weight, scales, x, scratch and out are addresses."""

    taken: int
    """Portions of the outputs."""
    portion: int
    """Blocks of L outputs in one."""
    weight: int
    scales: int
    x: int
    scratch: int
    """For what rows become: high, low, steps and sums."""
    out: int
    rows: int
    n: int
    m: int
    four: int
    """Whether there are four bits."""


@_inner
def _places(r):
    """Addresses of high, low, steps and sums."""
    size = r.rows * r.n
    steps = r.scratch + 2 * size
    return r.scratch, r.scratch + size, steps, steps + 4 * (size // _GROUP)


@_inner
def _round_rows(record):
    """Rows as whole numbers, with a step for each group, and the sum of each group.

    A group with a number that is not finite gets a step that is not.
    """
    r = record_at(record, Record)
    numbers = r.rows * r.n
    groups = numbers // _GROUP
    at_high, at_low, at_steps, at_sums = _places(r)
    x, bits = carray(pointer(r.x), (numbers,)), carray(integers(r.x), (numbers,))
    high, low = carray(whole_bytes(at_high), (numbers,)), carray(whole_bytes(at_low), (numbers,))
    steps, sums = carray(pointer(at_steps), (groups,)), carray(pointer(at_sums), (groups,))
    largest = np.empty(1, dtype=np.int32)
    of_largest = largest.view(np.float32)
    for g in range(groups):
        first = g * _GROUP
        most = int32(0)
        for i in range(first, first + _GROUP):  # as whole numbers, floats without a sign are in the same order
            most = max(most, bits[i] & int32(0x7FFFFFFF))  # and NaN is last
        largest[0] = most
        step = of_largest[0] / float32(127.0)
        inverse = float32(1.0) / step if step > float32(1e-30) else float32(0.0)
        total = int32(0)
        for i in range(first, first + _GROUP):
            value = x[i] * inverse
            whole = np.rint(value)
            rest = np.rint((value - whole) * _PARTS)
            high[i] = int32(whole)
            low[i] = int32(rest)
            total += int32(254) * int32(whole) + int32(rest)
        steps[g] = step
        sums[g] = step * (float32(total) / _PARTS)


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _load(builder: Any, address: Any, offset: Any, kind: Any, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(builder.add(address, offset), ir.PointerType(kind)), align=align)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_on_lanes(builder, "llvm.fmuladd", a, b, c)


def _dot(builder: Any, sums: Any, codes: Any, x: Any) -> Any:
    """sums + four products of unsigned codes and signed x in each lane."""
    kind = ir.FunctionType(_INTS, [_INTS] * 3)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [sums, codes, x])


def _four_codes(builder: Any, weight: Any, step: int) -> list[Any]:
    """Of a group's step, the codes of the next eight inputs."""
    codes = _load(builder, weight, _LONG(step * _VECTOR), _INTS)
    halves = codes, builder.lshr(codes, _constant(_INTS, 4))
    return [builder.and_(half, _constant(_INTS, 0x0F0F0F0F)) for half in halves]


def _eight_codes(builder: Any, weight: Any, step: int) -> list[Any]:
    """Likewise."""
    return [_load(builder, weight, _LONG((2 * step + half) * _VECTOR), _INTS) for half in range(2)]


def _groups(builder: Any, weight: Any, rows: list[tuple[Any, Any]], codes_of: Any) -> list[Any]:
    """The sums of a group, high + low / 254, of L outputs for each row's high and low."""
    sums = [[[_constant(_INTS, 0)] * 2 for _ in row] for row in rows]
    for step in range(_GROUP // 8):
        for half, codes in enumerate(codes_of(builder, weight, step)):
            for row, of_row in zip(rows, sums, strict=True):
                for x, plane in zip(row, of_row, strict=True):
                    four = broadcast(builder, _load(builder, x, _LONG(8 * step + 4 * half), _INT))
                    plane[half] = _dot(builder, plane[half], codes, four)
    numbers = [[builder.sitofp(builder.add(*plane), _FLOATS) for plane in row] for row in sums]
    part = _constant(_FLOATS, float(1 / _PARTS))
    return [_fma(builder, low, part, high) for high, low in numbers]


def _block(count: int, *, four: bool) -> Any:
    """The function that makes L outputs of so many rows; n and m are numbers, all else addresses."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, scales, high, low, steps, sums, out, n, m = args
        groups = builder.udiv(n, _LONG(_GROUP))
        results = [cgutils.alloca_once_value(builder, _constant(_FLOATS, 0.0)) for _ in range(count)]
        with cgutils.for_range(builder, groups) as loop:
            g = loop.index
            inputs = [builder.add(builder.mul(_LONG(row), n), builder.mul(g, _LONG(_GROUP))) for row in range(count)]
            dots = _groups(
                builder,
                builder.add(weight, builder.mul(g, _LONG(_GROUP * LANES // (2 if four else 1)))),
                [(builder.add(high, first), builder.add(low, first)) for first in inputs],
                _four_codes if four else _eight_codes,
            )
            if four:
                pair = _load(builder, scales, builder.mul(g, builder.mul(m, _LONG(4))), _INTS)
                scale = builder.bitcast(builder.shl(pair, _constant(_INTS, 16)), _FLOATS)
                offset = builder.bitcast(builder.and_(pair, _constant(_INTS, -65536)), _FLOATS)
            for row, (dot, result) in enumerate(zip(dots, results, strict=True)):
                place = builder.mul(builder.add(builder.mul(_LONG(row), groups), g), _LONG(4))
                step, total = (broadcast(builder, _load(builder, x, place, _FLOAT, 4)) for x in (steps, sums))
                products = _fma(builder, dot, step, builder.fmul(total, _constant(_FLOATS, -8.0 if four else -128.0)))
                so_far = builder.load(result)
                if four:
                    so_far = _fma(builder, offset, total, _fma(builder, scale, products, so_far))
                else:
                    so_far = builder.fadd(so_far, products)
                builder.store(so_far, result)
        found = [builder.load(result) for result in results]
        if not four:
            short = _load(builder, scales, _LONG(0), ir.VectorType(ir.IntType(16), LANES))
            scale = builder.bitcast(builder.shl(builder.zext(short, _INTS), _constant(_INTS, 16)), _FLOATS)
            found = [builder.fmul(x, scale) for x in found]
        for row, x in enumerate(found):
            place = builder.add(out, builder.mul(_LONG(4 * row), m))
            builder.store(x, builder.inttoptr(place, ir.PointerType(_FLOATS)), align=4)
        return context.get_dummy_value()

    @intrinsic
    def block(typingctx, weight, scales, high, low, steps, sums, out, n, m):
        return types.void(*[types.int64] * 9), build

    return block


_one_row_of_four_bits, _rows_of_four_bits = _block(1, four=True), _block(_ROWS, four=True)
_one_row_of_eight_bits, _rows_of_eight_bits = _block(1, four=False), _block(_ROWS, four=False)


@_inner
def _multiply(record):
    """Take portions of the outputs until none are left."""
    r = record_at(record, Record)
    n, m, four = r.n, r.m, r.four
    high, low, steps, sums = _places(r)
    groups, blocks = n // _GROUP, m // LANES
    while True:
        first = take(record) * r.portion
        if first >= blocks:
            break
        for i in range(first, min(first + r.portion, blocks)):
            w = r.weight + i * LANES * (n // 2 if four else n)
            s = r.scales + i * LANES * (4 if four else 2)
            b = 0
            while b < r.rows:
                row, of_groups = b * n, 4 * b * groups
                x, rest, x_steps, x_sums = high + row, low + row, steps + of_groups, sums + of_groups
                to = r.out + 4 * (b * m + i * LANES)
                several = b + _ROWS <= r.rows
                if several and four:
                    _rows_of_four_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
                elif several:
                    _rows_of_eight_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
                elif four:
                    _one_row_of_four_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
                else:
                    _one_row_of_eight_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
                b += _ROWS if several else 1


def _compile(version: int) -> Any:
    # Numba's cache looks at this file alone; `version` is part of its key.
    @cfunc("void(int64)", cache=True)
    def round_rows(record):
        _ = version
        _round_rows(record)

    @cfunc("void(int64)", cache=True)
    def multiply(record):
        _ = version
        _multiply(record)

    return round_rows, multiply


round_rows, multiply = _compile(sources_version(Path(__file__).parent))
