"""Whole numbers of eight bits times those of four or eight; importing this compiles it (`runtime.load_kernels`).

A number of a row is step * (high + low / 254) with high and low from -127 to 127; one of the matrix is offset + scale *
(code - 8), or scale * (code - 128). So high * code and low * code of a group's inputs are summed exactly: in int32, by
one instruction of VNNI for four inputs of each of the L outputs; or, where there is none, by two instructions in int16,
which holds a whole group's sums of four bits (of 30,480 at the most), so that eight bits are two times four.

Of many rows, low is 0 in the groups whose steps are small among their row's, and those that are multiplied at once go
without it in the groups where none of them has it. That changes no bit of a row's product, which has a sum of its own
for low.

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
)

VNNI = ("+avx512vnni" if LANES == 16 else "+avxvnni") in FEATURES
_GROUP = 32
_ROWS_OF_FOUR_BITS, _ROWS_OF_EIGHT_BITS = 4, 4 if VNNI else 2
"""That are multiplied at once where there are as many: codes are taken apart once for all of them."""
_BLOCKS = 2
"""Of L outputs each, that are made at once of such rows by four bits: a row's numbers are read once for all of them."""
_FINE = np.float32(2.0)
"""Times the mean of a row's squared steps: among many rows, a group whose squared step is above it has a low part."""
_ROUNDED = 16
"""Rows that a thread rounds at a time."""
_TILE = 64
"""Rows that are multiplied by all of a portion before others are, so that they stay in the second-level cache."""
_GATHERED = 4
"""Times L rows of a matrix of eight bits that are added up at once."""
_AHEAD = 4096
"""Bytes of the matrix: from those that are multiplied to those that are fetched from memory meanwhile."""
_inner: Any = njit(nogil=True, error_model="numpy", inline="never")
_PARTS = np.float32(254.0)
"""Of a step, in which what is left of a number is rounded."""
_BYTE, _INT, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_LANE_BYTES = ir.VectorType(_BYTE, LANES)
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
    """For what rows become, in this order: `_places`."""
    out: int
    rows: int
    n: int
    m: int
    four: int
    """Whether there are four bits."""
    many: int
    """Whether rows are many, and small groups of theirs have no low part."""


@_inner
def _places(r):
    """Addresses of high, low, steps and sums; then, for rows multiplied at once, how many groups have a low part, and
    which."""
    size = r.rows * r.n
    steps = r.scratch + 2 * size
    of_groups = 4 * (size // _GROUP)
    return r.scratch, r.scratch + size, steps, steps + of_groups, steps + 2 * of_groups


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _load(builder: Any, address: Any, offset: Any, kind: Any, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(builder.add(address, offset), ir.PointerType(kind)), align=align)


def _fetch(builder: Any, address: Any) -> None:
    fetch(builder, builder.inttoptr(address, ir.PointerType(_BYTE)))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_on_lanes(builder, "llvm.fmuladd", a, b, c)


def _call(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    """One of LLVM's own functions, or of the machine's instructions."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@intrinsic
def _largest(typingctx, x):
    """Of a group of numbers at an address, the largest one's bits without its sign: NaN is above all others."""

    def codegen(context, builder, sig, args):
        most = _constant(_INTS, 0)
        for first in range(0, _GROUP, LANES):  # as whole numbers, floats without a sign are in the same order
            bits = builder.and_(_load(builder, args[0], _LONG(4 * first), _INTS), _constant(_INTS, 0x7FFFFFFF))
            most = builder.select(builder.icmp_unsigned(">", bits, most), bits, most)
        return builder.bitcast(_call(builder, f"llvm.vector.reduce.umax.v{LANES}i32", _INT, most), _FLOAT)

    return types.float32(types.int64), codegen


@intrinsic
def _round_group(typingctx, x, high, low, inverse, parts):
    """Round a group of numbers at an address times a factor: high, and low in so many parts of one.

    Returns:
        The sum of 254 * high + low.
    """

    def codegen(context, builder, sig, args):
        x, high, low, inverse, parts = args
        inverse, parts = broadcast(builder, inverse), broadcast(builder, parts)
        total = _constant(_INTS, 0)
        for first in range(0, _GROUP, LANES):
            value = builder.fmul(_load(builder, x, _LONG(4 * first), _FLOATS), inverse)
            whole = call_on_lanes(builder, "llvm.rint", value)
            rest = call_on_lanes(builder, "llvm.rint", builder.fmul(builder.fsub(value, whole), parts))
            numbers = [builder.fptosi(number, _INTS) for number in (whole, rest)]
            for place, number in zip((high, low), numbers, strict=True):
                to = builder.inttoptr(builder.add(place, _LONG(first)), ir.PointerType(_LANE_BYTES))
                builder.store(builder.trunc(number, _LANE_BYTES), to, align=1)
            total = builder.add(total, builder.add(builder.mul(numbers[0], _constant(_INTS, 254)), numbers[1]))
        return _call(builder, f"llvm.vector.reduce.add.v{LANES}i32", _INT, total)

    return types.int32(types.int64, types.int64, types.int64, types.float32, types.float32), codegen


@_inner
def _round_row(r, b):
    n, groups = r.n, r.n // _GROUP
    high, low, at_steps, at_sums, _ = _places(r)
    place, of_groups = b * n, 4 * b * groups
    x = r.x + 4 * place
    steps, sums = carray(pointer(at_steps + of_groups), (groups,)), carray(pointer(at_sums + of_groups), (groups,))
    most = float32(0.0)
    for g in range(groups):
        steps[g] = _largest(x + 4 * g * _GROUP) / float32(127.0)
        most = max(most, steps[g])
    part = float32(1.0) / most if most > float32(1e-30) else float32(0.0)
    squares = float32(0.0)
    for g in range(groups):
        squares += (steps[g] * part) * (steps[g] * part)
    enough = _FINE * squares / float32(groups) if r.many else float32(-1.0)
    for g in range(groups):
        step, first = steps[g], g * _GROUP
        inverse = float32(1.0) / step if step > float32(1e-30) else float32(0.0)
        parts = _PARTS if (step * part) * (step * part) > enough else float32(0.0)
        total = _round_group(x + 4 * first, high + place + first, low + place + first, inverse, parts)
        sums[g] = step * (float32(total) / _PARTS)


@_inner
def _list_fine_groups(r, b):
    """Those with a low part in any of the rows from b on that are multiplied at once."""
    n, groups = r.n, r.n // _GROUP
    _, at_low, _, _, at_fine = _places(r)
    low = carray(integers(at_low), (r.rows * n // 4,))
    fine = carray(integers(at_fine + 4 * (b // _ROWS_OF_FOUR_BITS) * (groups + 1)), (groups + 1,))
    count = int32(0)
    for g in range(groups):
        found = int32(0)
        for row in range(b, b + _ROWS_OF_FOUR_BITS):
            first = (row * n + g * _GROUP) // 4
            for i in range(first, first + _GROUP // 4):
                found |= low[i]
        if found != 0:
            count += int32(1)
            fine[count] = g
    fine[0] = count


@_inner
def _round_rows(record):
    """Rows as whole numbers, with a step and a sum for each group: some at a time until none are left.

    A group with a number that is not finite gets a step that is not.
    """
    r = record_at(record, Record)
    while True:
        first = take(record) * _ROUNDED
        if first >= r.rows:
            break
        last = min(first + _ROUNDED, r.rows)
        for b in range(first, last):
            _round_row(r, b)
        if r.four:
            for b in range(first, last - _ROWS_OF_FOUR_BITS + 1, _ROWS_OF_FOUR_BITS):  # fewer go one by one
                _list_fine_groups(r, b)


class _WithVNNI:
    """The sum of codes * x over a group, of L outputs: four inputs a lane are added to int32.

    Args:
        four: whether codes have four bits.
        alone: whether there are few such sums at a time, so that one addition would wait for another.
    """

    def __init__(self, *, four: bool, alone: bool) -> None:
        self.parts = [_constant(_INTS, 0)] * (2 if alone else 1)

    def add(self, builder: Any, half: int, codes: list[Any], x: Any) -> None:
        """Of four more inputs, those of one half of a step."""
        name, i = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", half % len(self.parts)
        self.parts[i] = _call(builder, name, _INTS, self.parts[i], codes[0], x)

    def total(self, builder: Any) -> Any:
        """L int32."""
        return builder.add(*self.parts) if len(self.parts) > 1 else self.parts[0]


class _WithoutVNNI:
    """Likewise, by pairs of inputs, which are added to int16; each half of codes of eight bits has a sum of its own."""

    _PAIRS, _SUMS = (
        ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")
        if LANES == 16
        else ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")
    )
    _BYTES, _SHORTS = ir.VectorType(_BYTE, _VECTOR), ir.VectorType(ir.IntType(16), _VECTOR // 2)

    def __init__(self, *, four: bool, alone: bool) -> None:
        self.parts = [ir.Constant(self._SHORTS, [0] * (_VECTOR // 2))] * (1 if four else 2)

    def add(self, builder: Any, half: int, codes: list[Any], x: Any) -> None:
        """Of four more inputs."""
        x = builder.bitcast(x, self._BYTES)
        for i, part in enumerate(codes):
            pairs = _call(builder, self._PAIRS, self._SHORTS, builder.bitcast(part, self._BYTES), x)
            self.parts[i] = builder.add(self.parts[i], pairs)

    def total(self, builder: Any) -> Any:
        """L int32."""
        total = _constant(_INTS, 0)
        for i, pairs in enumerate(self.parts):
            weights = ir.Constant(self._SHORTS, [16**i] * (_VECTOR // 2))
            total = builder.add(total, _call(builder, self._SUMS, _INTS, pairs, weights))
        return total


_Sums = _WithVNNI if VNNI else _WithoutVNNI


def _halves(builder: Any, codes: Any) -> list[Any]:
    """The lower and the upper four bits of each byte."""
    return [
        builder.and_(half, _constant(_INTS, 0x0F0F0F0F)) for half in (codes, builder.lshr(codes, _constant(_INTS, 4)))
    ]


def _codes(builder: Any, weight: Any, step: Any, *, four: bool) -> list[Any]:
    """Of a step of a group, eight inputs: the codes of the first four and of the last."""
    if four:
        return _halves(builder, _load(builder, weight, builder.mul(step, _LONG(_VECTOR)), _INTS))
    first = builder.mul(step, _LONG(2 * _VECTOR))
    return [_load(builder, weight, builder.add(first, _LONG(half * _VECTOR)), _INTS) for half in range(2)]


def _add_step(builder: Any, sums: list[list[Any]], weights: list[Any], inputs: list[Any], step: Any, *, four: bool):
    """Add a step of a group to the sums of each of the inputs, with each of the weights."""
    codes = [_codes(builder, weight, step, four=four) for weight in weights]
    for half in range(2):
        parts = [[of[half]] if VNNI or four else _halves(builder, of[half]) for of in codes]
        for x, of_x in zip(inputs, sums, strict=True):
            place = builder.add(builder.mul(step, _LONG(8)), _LONG(4 * half))
            four_inputs = broadcast(builder, _load(builder, x, place, _INT))
            for of_weight, found in zip(parts, of_x, strict=True):
                found.add(builder, half, of_weight, four_inputs)


def _sums_of_group(builder: Any, weights: list[Any], inputs: list[Any], steps: Any, *, four: bool) -> list[list[Any]]:
    """The sums of codes * x over a group: of L outputs of each of the weights, for each of the inputs.

    Args:
        builder: of the code.
        weights: addresses.
        inputs: likewise.
        steps: how many eights of inputs a group has, if they are to be counted as the code runs: LLVM would
            else take so many at once that sums leave their registers.
        four: whether codes have four bits.
    """
    alone = len(weights) * len(inputs) < 8
    sums = [[_Sums(four=four, alone=alone) for _ in weights] for _ in inputs]
    every = [found for of_x in sums for found in of_x]
    if steps is None:
        for step in range(_GROUP // 8):
            _add_step(builder, sums, weights, inputs, _LONG(step), four=four)
    else:
        places = [[cgutils.alloca_once(builder, part.type) for part in found.parts] for found in every]

        def put() -> None:
            for found, of_found in zip(every, places, strict=True):
                for part, place in zip(found.parts, of_found, strict=True):
                    builder.store(part, place)

        def get() -> None:
            for found, of_found in zip(every, places, strict=True):
                found.parts = [builder.load(place) for place in of_found]

        put()
        with cgutils.for_range(builder, steps) as loop:
            get()
            _add_step(builder, sums, weights, inputs, loop.index, four=four)
            put()
        get()
    return [[builder.sitofp(found.total(builder), _FLOATS) for found in of_x] for of_x in sums]


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


class _Makes:
    """What makes so many times L outputs of so many rows.

    Args:
        builder: of its code.
        args: addresses and numbers, as `_block` has them.
        count: rows.
        blocks: times L.
        four: whether codes have four bits.
    """

    def __init__(self, builder: Any, args: Any, count: int, blocks: int, *, four: bool) -> None:
        self.builder, self.count, self.blocks, self.four = builder, count, blocks, four
        self.weight, self.scales, self.high, self.low, self.steps, self.sums, self.fine, self.out, self.n, self.m = args
        self.groups = builder.udiv(self.n, _LONG(_GROUP))
        self.coarse, self.rest = (
            [[cgutils.alloca_once_value(builder, _constant(_FLOATS, 0.0)) for _ in range(blocks)] for _ in range(count)]
            for _ in range(2)
        )
        """Sums of each row's high parts, and of its low ones."""
        self._size = _GROUP * LANES // (2 if four else 1)

    def weights(self, g: Any) -> list[Any]:
        """Addresses of a group's codes."""
        first = self.builder.add(self.weight, self.builder.mul(g, _LONG(self._size)))
        row = self.builder.mul(self.groups, _LONG(self._size))
        return [self.builder.add(first, self.builder.mul(row, _LONG(block))) for block in range(self.blocks)]

    def inputs(self, g: Any, plane: Any) -> list[Any]:
        """Addresses of a group of each row."""
        first = self.builder.add(plane, self.builder.mul(g, _LONG(_GROUP)))
        return [self.builder.add(first, self.builder.mul(_LONG(row), self.n)) for row in range(self.count)]

    def fetch(self, g: Any) -> None:
        """Fetch what comes after a group."""
        for weight in self.weights(g):
            for line in range(0, self._size, 64):
                _fetch(self.builder, self.builder.add(weight, _LONG(_AHEAD + line)))
        if self.four:
            _fetch(self.builder, self.builder.add(self._pairs(g), _LONG(2 * 64)))

    def _pairs(self, g: Any) -> Any:
        return self.builder.add(self.scales, self.builder.mul(g, self.builder.mul(self.m, _LONG(4))))

    def scales_and_least(self, g: Any) -> list[tuple[Any, Any]]:
        """Of a group: of each L outputs, what stands for one code more, and for the code 0."""
        if not self.four:
            return [(None, _constant(_FLOATS, -128.0))] * self.blocks
        builder, found = self.builder, []
        for block in range(self.blocks):
            place = builder.add(self._pairs(g), _LONG(block * _VECTOR))
            scale, offset = _scale_and_offset(builder, place, LANES)
            found.append((scale, _fma(builder, scale, _constant(_FLOATS, -8.0), offset)))
        return found

    def of_rows(self, g: Any, addresses: Any) -> list[Any]:
        """A group's number of each row, in every lane."""
        places = [self.builder.add(self.builder.mul(_LONG(row), self.groups), g) for row in range(self.count)]
        return [
            broadcast(self.builder, _load(self.builder, addresses, self.builder.mul(place, _LONG(4)), _FLOAT, 4))
            for place in places
        ]

    def add(self, results: list[list[Any]], dots: list[list[Any]], steps: list[Any], scales: list[Any]) -> None:
        """Add steps * scales * dots to the results."""
        for of_row, of_dots, step in zip(results, dots, steps, strict=True):
            for result, dot, scale in zip(of_row, of_dots, scales, strict=True):
                scaled = dot if scale is None else self.builder.fmul(dot, scale)
                self.builder.store(_fma(self.builder, scaled, step, self.builder.load(result)), result)

    def store(self) -> None:
        """Put the results where they belong."""
        builder, part = self.builder, _constant(_FLOATS, float(1 / _PARTS))
        for row, sums in enumerate(zip(self.coarse, self.rest, strict=True)):
            for block, (coarse, rest) in enumerate(zip(*sums, strict=True)):
                found = _fma(builder, builder.load(rest), part, builder.load(coarse))
                if not self.four:
                    found = builder.fmul(found, _scales(builder, self.scales, LANES))
                place = builder.add(self.out, builder.add(builder.mul(_LONG(4 * row), self.m), _LONG(block * _VECTOR)))
                builder.store(found, builder.inttoptr(place, ir.PointerType(_FLOATS)), align=4)


def _block(count: int, blocks: int, *, four: bool) -> Any:
    """The function that makes so many times L outputs of so many rows; n and m are numbers, all else addresses.

    Args:
        count: rows.
        blocks: one, or with four bits any number.
        four: whether codes have four bits; then several rows are multiplied by low parts where any of them has one.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        make = _Makes(builder, args, count, blocks, four=four)
        apart = four and count > 1
        eights = builder.udiv(builder.udiv(make.n, make.groups), _LONG(8)) if apart else None
        with cgutils.for_range(builder, make.groups) as loop:
            g = loop.index
            make.fetch(g)
            planes = make.inputs(g, make.high) + ([] if apart else make.inputs(g, make.low))
            dots = _sums_of_group(builder, make.weights(g), planes, eights, four=four)
            pairs, steps = make.scales_and_least(g), make.of_rows(g, make.steps)
            scales, least = [scale for scale, _ in pairs], [[number for _, number in pairs]] * count
            make.add(make.coarse, least, make.of_rows(g, make.sums), [None] * blocks)
            make.add(make.coarse, dots[:count], steps, scales)
            if not apart:
                make.add(make.rest, dots[count:], steps, scales)
        if apart:
            fine = builder.zext(_load(builder, make.fine, _LONG(0), _INT, 4), _LONG)
            with cgutils.for_range(builder, fine) as loop:
                place = builder.mul(builder.add(loop.index, _LONG(1)), _LONG(4))
                g = builder.zext(_load(builder, make.fine, place, _INT, 4), _LONG)
                dots = _sums_of_group(builder, make.weights(g), make.inputs(g, make.low), eights, four=True)
                scales = [scale for scale, _ in make.scales_and_least(g)]
                make.add(make.rest, dots, make.of_rows(g, make.steps), scales)
        make.store()
        return context.get_dummy_value()

    @intrinsic
    def block(typingctx, weight, scales, high, low, steps, sums, fine, out, n, m):
        return types.void(*[types.int64] * 10), build

    return block


_one_row_of_four_bits, _one_row_of_eight_bits = _block(1, 1, four=True), _block(1, 1, four=False)
_rows_of_four_bits, _rows_of_eight_bits = (
    _block(_ROWS_OF_FOUR_BITS, 1, four=True),
    _block(_ROWS_OF_EIGHT_BITS, 1, four=False),
)
_tile_of_four_bits = _block(_ROWS_OF_FOUR_BITS, _BLOCKS, four=True)


@_inner
def _multiply_blocks(r, i, blocks, b, end):
    """As many times L outputs, at most `_BLOCKS`, of the rows from b on."""
    n, m, four = r.n, r.m, r.four
    high, low, steps, sums, fine = _places(r)
    groups = n // _GROUP
    w = r.weight + i * LANES * (n // 2 if four else n)
    s = r.scales + i * LANES * (4 if four else 2)
    together = _ROWS_OF_FOUR_BITS if four else _ROWS_OF_EIGHT_BITS
    while b < end:
        row, of_groups = b * n, 4 * b * groups
        x, rest, x_steps, x_sums = high + row, low + row, steps + of_groups, sums + of_groups
        x_fine = fine + 4 * (b // _ROWS_OF_FOUR_BITS) * (groups + 1)
        to = r.out + 4 * (b * m + i * LANES)
        several = b + together <= end
        if several and four and blocks == _BLOCKS:
            _tile_of_four_bits(w, s, x, rest, x_steps, x_sums, x_fine, to, n, m)
        elif several and four:
            _rows_of_four_bits(w, s, x, rest, x_steps, x_sums, x_fine, to, n, m)
        elif several:
            _rows_of_eight_bits(w, s, x, rest, x_steps, x_sums, x_fine, to, n, m)
        elif four:
            for j in range(blocks):
                at, of_scales = w + j * LANES * (n // 2), s + 4 * j * LANES
                _one_row_of_four_bits(at, of_scales, x, rest, x_steps, x_sums, x_fine, to + 4 * j * LANES, n, m)
        else:
            _one_row_of_eight_bits(w, s, x, rest, x_steps, x_sums, x_fine, to, n, m)
        b += together if several else 1


@_inner
def _multiply(record):
    """Take portions of the outputs until none are left."""
    r = record_at(record, Record)
    blocks = r.m // LANES
    together = _BLOCKS if r.four else 1
    while True:
        first = take(record) * r.portion
        if first >= blocks:
            break
        last = min(first + r.portion, blocks)
        for b in range(0, r.rows, _TILE):
            end = min(b + _TILE, r.rows)
            for i in range(first, last, together):
                _multiply_blocks(r, i, min(together, last - i), b, end)


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


class Gathering(NamedTuple):
    """What `gather` is given; weight, x and out are addresses."""

    taken: int
    """Portions of the outputs."""
    portion: int
    """Blocks of L outputs in one."""
    weight: int
    x: int
    """Of float32 numbers, (rows, m)."""
    out: int
    """Of zeros, (portions, rows, n, L), whose sum over the first and the last is the product."""
    rows: int
    n: int
    m: int


def _gathered(blocks: int) -> Any:
    """The function that adds so many times L rows of the matrix, each times a number; n is one, all else addresses."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, x, out, n = args
        factors = [_load(builder, x, _LONG(block * _VECTOR), _FLOATS, 4) for block in range(blocks)]
        size = builder.mul(n, _LONG(LANES))
        with cgutils.for_range(builder, builder.udiv(n, _LONG(4))) as loop:
            first = builder.add(weight, builder.mul(loop.index, _LONG(_VECTOR)))
            places = [builder.add(first, builder.mul(size, _LONG(block))) for block in range(blocks)]
            for place in places:
                _fetch(builder, builder.add(place, builder.mul(size, _LONG(blocks))))
            codes = [_load(builder, place, _LONG(0), _INTS) for place in places]
            codes = [builder.xor(code, _constant(_INTS, 0x80808080)) for code in codes]
            to = builder.add(out, builder.mul(loop.index, _LONG(4 * _VECTOR)))
            for byte in range(4):
                place = builder.inttoptr(builder.add(to, _LONG(byte * _VECTOR)), ir.PointerType(_FLOATS))
                total = builder.load(place, align=4)
                for code, factor in zip(codes, factors, strict=True):
                    number = builder.shl(code, _constant(_INTS, 24 - 8 * byte)) if byte < 3 else code
                    number = builder.sitofp(builder.ashr(number, _constant(_INTS, 24)), _FLOATS)
                    total = _fma(builder, number, factor, total)
                builder.store(total, place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def gathered(typingctx, weight, x, out, n):
        return types.void(*[types.int64] * 4), build

    return gathered


_gathered_one, _gathered_together = _gathered(1), _gathered(_GATHERED)


@_inner
def _any(x, count):
    """Whether any of so many numbers at an address is not 0."""
    numbers = carray(pointer(x), (count,))
    found = False
    for i in range(count):
        found |= numbers[i] != 0
    return found


@_inner
def _gather(record):
    """Take portions of the outputs until none are left."""
    r = record_at(record, Gathering)
    n, m, blocks = r.n, r.m, r.m // LANES
    while True:
        at = take(record)
        first = at * r.portion
        if first >= blocks:
            break
        last = min(first + r.portion, blocks)
        i = first
        while i < last:
            together = _GATHERED if i + _GATHERED <= last else 1
            w = r.weight + i * LANES * n
            for b in range(r.rows):
                x = r.x + 4 * (b * m + i * LANES)
                to = r.out + 4 * (at * r.rows + b) * n * LANES
                if not _any(x, together * LANES):  # as of tokens that a softmax leaves out
                    continue
                if together == _GATHERED:
                    _gathered_together(w, x, to, n)
                else:
                    _gathered_one(w, x, to, n)
            i += together


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

    @cfunc("void(int64)", cache=True)
    def gather(record):
        _ = version
        _gather(record)

    return round_rows, multiply, unpack, gather


round_rows, multiply, unpack, gather = _compile(sources_version(Path(__file__).parent))
