"""Whole numbers of eight bits times those of four or eight; importing this compiles it (`runtime.load_kernels`).

A number of a row is step * (high + low / 254) with high and low from -127 to 127; one of the matrix is offset + scale *
(code - 8), or scale * (code - 128). So high * code and low * code of a group's inputs are summed exactly: in int32, by
one instruction of VNNI for four inputs of each of the L outputs; or, where there is none, by two instructions in int16,
which holds a whole group's sums of four bits (of 30,480 at the most), so that eight bits are two times four.

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
    FEATURES,
    LANES,
    broadcast,
    call_on_lanes,
    fetch,
    integers,
    intrinsic,
    pointer,
    record_at,
    take,
    whole_bytes,
)

VNNI = ("+avx512vnni" if LANES == 16 else "+avxvnni") in FEATURES
_GROUP = 32
_ROWS_OF_FOUR_BITS, _ROWS_OF_EIGHT_BITS = 4, 4 if VNNI else 2
"""That are multiplied at once where there are as many: codes are taken apart once for all of them."""
_TILE = 64
"""Rows that are multiplied by all of a portion before others are, so that they stay in the second-level cache."""
_AHEAD = 4096
"""Bytes of the matrix: from those that are multiplied to those that are fetched from memory meanwhile."""
_inner: Any = njit(nogil=True, error_model="numpy", inline="never")
_PARTS = np.float32(254.0)
"""Of a step, in which what is left of a number is rounded."""
_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_EIGHT_INTS, _EIGHT_FLOATS = ir.VectorType(_INT, 8), ir.VectorType(_FLOAT, 8)
_VECTOR = 4 * LANES
"""Bytes of a vector."""


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


def _fetch(builder: Any, address: Any) -> None:
    fetch(builder, builder.inttoptr(address, ir.PointerType(ir.IntType(8))))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_on_lanes(builder, "llvm.fmuladd", a, b, c)


def _call(builder: Any, name: str, result: ir.VectorType, *args: Any) -> Any:
    """One of the machine's own instructions."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


class _WithVNNI:
    """The sum of codes * x over a group, of L outputs: four inputs a lane are added to int32."""

    def __init__(self, *, four: bool) -> None:
        self._sums = [_constant(_INTS, 0)] * 2  # which do not wait for one another

    def add(self, builder: Any, half: int, parts: list[Any], x: Any) -> None:
        """Of four more inputs, those of one half of a step."""
        name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
        self._sums[half] = _call(builder, name, _INTS, self._sums[half], parts[0], x)

    def total(self, builder: Any) -> Any:
        """L int32."""
        return builder.add(*self._sums)


class _WithoutVNNI:
    """Likewise, by pairs of inputs, which are added to int16; of codes of eight bits, each half has sums of its own."""

    _PAIRS, _SUMS = (
        ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")
        if LANES == 16
        else ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")
    )
    _BYTES, _SHORTS = ir.VectorType(ir.IntType(8), _VECTOR), ir.VectorType(ir.IntType(16), _VECTOR // 2)

    def __init__(self, *, four: bool) -> None:
        self._sums = [ir.Constant(self._SHORTS, [0] * (_VECTOR // 2))] * (1 if four else 2)

    def add(self, builder: Any, half: int, parts: list[Any], x: Any) -> None:
        """Of four more inputs."""
        x = builder.bitcast(x, self._BYTES)
        for i, codes in enumerate(parts):
            pairs = _call(builder, self._PAIRS, self._SHORTS, builder.bitcast(codes, self._BYTES), x)
            self._sums[i] = builder.add(self._sums[i], pairs)

    def total(self, builder: Any) -> Any:
        """L int32."""
        total = _constant(_INTS, 0)
        for i, pairs in enumerate(self._sums):
            weights = ir.Constant(self._SHORTS, [16**i] * (_VECTOR // 2))
            total = builder.add(total, _call(builder, self._SUMS, _INTS, pairs, weights))
        return total


_Sums = _WithVNNI if VNNI else _WithoutVNNI


def _halves(builder: Any, codes: Any) -> list[Any]:
    """The lower and the upper four bits of each byte."""
    return [
        builder.and_(half, _constant(_INTS, 0x0F0F0F0F)) for half in (codes, builder.lshr(codes, _constant(_INTS, 4)))
    ]


def _four_codes(builder: Any, weight: Any, step: int) -> list[Any]:
    """Of a group's step, the codes of the next eight inputs."""
    return _halves(builder, _load(builder, weight, _LONG(step * _VECTOR), _INTS))


def _eight_codes(builder: Any, weight: Any, step: int) -> list[Any]:
    """Likewise."""
    return [_load(builder, weight, _LONG((2 * step + half) * _VECTOR), _INTS) for half in range(2)]


def _groups(builder: Any, weight: Any, rows: list[tuple[Any, Any]], *, four: bool) -> list[Any]:
    """The sums of a group, high + low / 254, of L outputs for each row's high and low."""
    codes_of = _four_codes if four else _eight_codes
    sums = [[_Sums(four=four) for _ in row] for row in rows]
    for step in range(_GROUP // 8):
        for half, codes in enumerate(codes_of(builder, weight, step)):
            parts = [codes] if VNNI or four else _halves(builder, codes)
            for row, of_row in zip(rows, sums, strict=True):
                for x, plane in zip(row, of_row, strict=True):
                    inputs = broadcast(builder, _load(builder, x, _LONG(8 * step + 4 * half), _INT))
                    plane.add(builder, half, parts, inputs)
    numbers = [[builder.sitofp(plane.total(builder), _FLOATS) for plane in row] for row in sums]
    part = _constant(_FLOATS, float(1 / _PARTS))
    return [_fma(builder, low, part, high) for high, low in numbers]


def _scales(builder: Any, address: Any, count: int) -> Any:
    """So many of the scales of rows, as float32."""
    kind = ir.VectorType(_INT, count)
    bits = builder.zext(_load(builder, address, _LONG(0), ir.VectorType(ir.IntType(16), count)), kind)
    return builder.bitcast(builder.shl(bits, ir.Constant(kind, [16] * count)), ir.VectorType(_FLOAT, count))


def _scale_and_offset(builder: Any, address: Any, count: int) -> tuple[Any, Any]:
    """Of a group, so many scales and as many offsets, as float32."""
    kind, floats = ir.VectorType(_INT, count), ir.VectorType(_FLOAT, count)
    pairs = _load(builder, address, _LONG(0), kind)
    scale = builder.bitcast(builder.shl(pairs, ir.Constant(kind, [16] * count)), floats)
    return scale, builder.bitcast(builder.and_(pairs, ir.Constant(kind, [-65536] * count)), floats)


def _block(count: int, *, four: bool) -> Any:
    """The function that makes L outputs of so many rows; n and m are numbers, all else addresses."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, scales, high, low, steps, sums, out, n, m = args
        groups = builder.udiv(n, _LONG(_GROUP))
        results = [cgutils.alloca_once_value(builder, _constant(_FLOATS, 0.0)) for _ in range(count)]
        with cgutils.for_range(builder, groups) as loop:
            g = loop.index
            inputs = [builder.add(builder.mul(_LONG(row), n), builder.mul(g, _LONG(_GROUP))) for row in range(count)]
            size = _GROUP * LANES // (2 if four else 1)
            codes = builder.add(weight, builder.mul(g, _LONG(size)))
            for line in range(0, size, 64):
                _fetch(builder, builder.add(codes, _LONG(_AHEAD + line)))
            planes = [(builder.add(high, first), builder.add(low, first)) for first in inputs]
            dots = _groups(builder, codes, planes, four=four)
            if four:
                pairs = builder.add(scales, builder.mul(g, builder.mul(m, _LONG(4))))
                _fetch(builder, builder.add(pairs, _LONG(2 * 64)))
                scale, offset = _scale_and_offset(builder, pairs, LANES)
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
            scale = _scales(builder, scales, LANES)
            found = [builder.fmul(x, scale) for x in found]
        for row, x in enumerate(found):
            place = builder.add(out, builder.mul(_LONG(4 * row), m))
            builder.store(x, builder.inttoptr(place, ir.PointerType(_FLOATS)), align=4)
        return context.get_dummy_value()

    @intrinsic
    def block(typingctx, weight, scales, high, low, steps, sums, out, n, m):
        return types.void(*[types.int64] * 9), build

    return block


_one_row_of_four_bits, _rows_of_four_bits = _block(1, four=True), _block(_ROWS_OF_FOUR_BITS, four=True)
_one_row_of_eight_bits, _rows_of_eight_bits = _block(1, four=False), _block(_ROWS_OF_EIGHT_BITS, four=False)


@_inner
def _multiply_block(r, i, b, end):
    """L outputs of the rows from b on."""
    n, m, four = r.n, r.m, r.four
    high, low, steps, sums = _places(r)
    groups = n // _GROUP
    w = r.weight + i * LANES * (n // 2 if four else n)
    s = r.scales + i * LANES * (4 if four else 2)
    together = _ROWS_OF_FOUR_BITS if four else _ROWS_OF_EIGHT_BITS
    while b < end:
        row, of_groups = b * n, 4 * b * groups
        x, rest, x_steps, x_sums = high + row, low + row, steps + of_groups, sums + of_groups
        to = r.out + 4 * (b * m + i * LANES)
        several = b + together <= end
        if several and four:
            _rows_of_four_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
        elif several:
            _rows_of_eight_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
        elif four:
            _one_row_of_four_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
        else:
            _one_row_of_eight_bits(w, s, x, rest, x_steps, x_sums, to, n, m)
        b += together if several else 1


@_inner
def _multiply(record):
    """Take portions of the outputs until none are left."""
    r = record_at(record, Record)
    blocks = r.m // LANES
    while True:
        first = take(record) * r.portion
        if first >= blocks:
            break
        for b in range(0, r.rows, _TILE):
            end = min(b + _TILE, r.rows)
            for i in range(first, min(first + r.portion, blocks)):
                _multiply_block(r, i, b, end)


class Unpacking(NamedTuple):
    """What `unpack` is given; weight, scales and out are addresses."""

    taken: int
    """Portions of the outputs."""
    portion: int
    """Blocks of L outputs in one."""
    weight: int
    scales: int
    out: int
    n: int
    m: int
    four: int
    short: int
    """Whether it becomes bf16, and not float32."""


def _of_first(builder: Any, x: Any) -> Any:
    """A vector's first number, eight times."""
    return broadcast(builder, builder.extract_element(x, _INT(0)), 8)


def _in_turn(builder: Any, words: list[Any], bits: int) -> Any:
    """Eight numbers of so many bits, four in each of two words, or in each half of the bytes of one word."""
    pair = builder.insert_element(ir.Constant(_EIGHT_INTS, ir.Undefined), words[0], _INT(0))
    pair = builder.insert_element(pair, words[-1], _INT(1))
    lanes = builder.shuffle_vector(pair, pair, ir.Constant(_EIGHT_INTS, [0] * 4 + [1] * 4))
    shifts = [8 * (i % 4) + (4 if bits == 4 and i >= 4 else 0) for i in range(8)]
    lanes = builder.lshr(lanes, ir.Constant(_EIGHT_INTS, shifts))
    return builder.and_(lanes, ir.Constant(_EIGHT_INTS, [2**bits - 1] * 8))


def _short(builder: Any, x: Any) -> Any:
    """Eight finite float32 as bf16, to nearest, ties to even."""
    bits, same = builder.bitcast(x, _EIGHT_INTS), lambda number: ir.Constant(_EIGHT_INTS, [number] * 8)
    odd = builder.and_(builder.lshr(bits, same(16)), same(1))
    bits = builder.add(builder.add(bits, same(0x7FFF)), odd)
    return builder.trunc(builder.lshr(bits, same(16)), ir.VectorType(ir.IntType(16), 8))


def _row(*, four: bool, short: bool) -> Any:
    """The function that makes one row of a matrix; n and m are numbers, all else addresses."""
    size = 2 if short else 4

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, scales, out, n, m = args
        if not four:
            scale = _of_first(builder, _scales(builder, scales, 1))
        with cgutils.for_range(builder, builder.udiv(n, _LONG(_GROUP))) as loop:
            g = loop.index
            if four:
                pairs = builder.add(scales, builder.mul(g, builder.mul(m, _LONG(4))))
                scale, offset = (_of_first(builder, x) for x in _scale_and_offset(builder, pairs, 1))
            for step in range(_GROUP // 8):
                words = 1 if four else 2
                first = builder.add(builder.mul(g, _LONG(4 * words)), _LONG(words * step))
                found = [
                    _load(builder, weight, builder.mul(builder.add(first, _LONG(word)), _LONG(_VECTOR)), _INT)
                    for word in range(words)
                ]
                codes = _in_turn(builder, found, 4 if four else 8)
                codes = builder.sub(codes, ir.Constant(_EIGHT_INTS, [8 if four else 128] * 8))
                made = builder.fmul(builder.sitofp(codes, _EIGHT_FLOATS), scale)
                if four:
                    made = builder.fadd(made, offset)
                made = _short(builder, made) if short else made
                eights = builder.add(builder.mul(g, _LONG(_GROUP // 8)), _LONG(step))
                place = builder.add(out, builder.mul(eights, _LONG(8 * size)))
                builder.store(made, builder.inttoptr(place, ir.PointerType(made.type)), align=size)
        return context.get_dummy_value()

    @intrinsic
    def row(typingctx, weight, scales, out, n, m):
        return types.void(*[types.int64] * 5), build

    return row


_row_of_four_bits, _short_row_of_four_bits = _row(four=True, short=False), _row(four=True, short=True)
_row_of_eight_bits, _short_row_of_eight_bits = _row(four=False, short=False), _row(four=False, short=True)


@_inner
def _unpack(record):
    """Take portions of the outputs until none are left."""
    r = record_at(record, Unpacking)
    n, m, four, short = r.n, r.m, r.four, r.short
    while True:
        first = take(record) * r.portion * LANES
        if first >= m:
            break
        for i in range(first, min(first + r.portion * LANES, m)):
            w = r.weight + i // LANES * LANES * (n // 2 if four else n) + 4 * (i % LANES)
            s, to = r.scales + i * (4 if four else 2), r.out + i * n * (2 if short else 4)
            if four and short:
                _short_row_of_four_bits(w, s, to, n, m)
            elif four:
                _row_of_four_bits(w, s, to, n, m)
            elif short:
                _short_row_of_eight_bits(w, s, to, n, m)
            else:
                _row_of_eight_bits(w, s, to, n, m)


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

    @cfunc("void(int64)", cache=True)
    def unpack(record):
        _ = version
        _unpack(record)

    return round_rows, multiply, unpack


round_rows, multiply, unpack = _compile(sources_version(Path(__file__).parent))
