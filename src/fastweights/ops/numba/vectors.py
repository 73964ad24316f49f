"""Eight or sixteen float32 numbers at a time in Numba: a vector type, loads and stores, and exp.

Numba has no vector type. Left to itself, LLVM guards each inner loop with tests for overlapping
arrays and forgets a tile of the state between two tokens; written with this type, the tile stays in
registers. A vector is a register of AVX-512 where there is one, and eight numbers elsewhere, which LLVM turns into
whatever the machine has (AVX, two SSE or NEON halves).

Memory is plain pointers to float32, and to int8 (`load_codes`): an array in Numba is a struct of seven fields with a
reference count, and passing it around costs compile time and keeps LLVM from inlining. Nothing checks bounds.

Notation
    x[i : i + LANES]   what `load(x, i)` reads and `store(x, i, vector)` writes at the pointer x
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils, codegen, config
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models

# What Numba compiles for, which its settings may hold below what the machine has.
_features: str | None = getattr(config, "CPU_FEATURES", None)
FEATURES = (codegen.get_host_cpu_features() if _features is None else _features).split(",")
"""As LLVM names them: "+avx512f"."""
LANES = 16 if "+avx512f" in FEATURES else 8
BLOCK = 32
"""Numbers in eight bits that share an exponent."""

_extending: Any = extending  # its decorators have no types

_INFINITY = float("inf")
_float = ir.FloatType()
_int = ir.IntType(32)
_floats = ir.VectorType(_float, LANES)
_ints = ir.VectorType(_int, LANES)
_shorts = ir.VectorType(ir.IntType(16), LANES)
_masks = ir.VectorType(ir.IntType(1), LANES)


inner: Any = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # pyright: ignore[reportCallIssue]
"""For functions that only kernels call: they need no wrappers to be called from Python, which take time to compile."""


def intrinsic(function: Callable) -> Any:
    """Numba's `intrinsic`, for type checkers a function of anything: the first parameter is the compiler's."""
    return _extending.intrinsic(function)


class VectorType(types.Type):
    """Numba's type of LANES float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = VectorType()
_pointer_type = types.CPointer(types.float32)
_numbers = types.UniTuple(types.int64, 3)


@_extending.register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM value, so it lives in a register."""

    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, _floats)


def _address_as(kind: Any, pointee: ir.Type) -> Any:
    """The function that takes an int64 address for a pointer to numbers of a kind."""

    @intrinsic
    def cast(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.inttoptr(args[0], ir.PointerType(pointee))

        return types.CPointer(kind)(types.int64), codegen

    return cast


pointer = _address_as(types.float32, _float)
integers = _address_as(types.int32, _int)
codes_at = _address_as(types.int8, ir.IntType(8))


@intrinsic
def shift(typingctx, x, i):
    """The pointer to x[i]."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return _pointer_type(_pointer_type, types.intp), codegen


@intrinsic
def integer_at(typingctx, address, i):
    """The i-th of the int64 numbers at an address."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], ir.PointerType(ir.IntType(64))), [args[1]]))

    return types.int64(types.int64, types.intp), codegen


@intrinsic
def take(typingctx, counter):
    """The int64 number at an address, which becomes one more: for one thread at a time."""

    def codegen(context, builder, sig, args):
        place = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def record_at(typingctx, address, kind):
    """The named tuple of int64 numbers at an address; fields called ..._strides are tuples of three."""
    cls = kind.instance_class
    parts = [_numbers if name.endswith("_strides") else types.int64 for name in cls._fields]
    record: Any = types.BaseTuple.from_types(parts, cls)

    def codegen(context, builder, sig, args):
        numbers = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        position = itertools.count()

        def read():
            return builder.load(builder.gep(numbers, [context.get_constant(types.intp, next(position))]))

        values = [
            read() if part is types.int64 else context.make_tuple(builder, part, [read() for _ in range(3)])
            for part in parts
        ]
        return context.make_tuple(builder, record, values)

    return record(types.int64, kind), codegen


@intrinsic
def place(typingctx, block, sizes, guard):
    """The start of each buffer of a block (scratch.py), as a named tuple like that of their sizes."""
    cls = sizes.instance_class
    starts: Any = types.BaseTuple.from_types([_pointer_type] * len(sizes), cls)

    def codegen(context, builder, sig, args):
        end, numbers, guard = args
        values = []
        for i in range(len(cls._fields)):
            start = builder.gep(end, [guard])
            values.append(start)
            end = builder.gep(start, [builder.extract_value(numbers, i)])
        return context.make_tuple(builder, starts, values)

    return starts(_pointer_type, sizes, types.int64), codegen


@intrinsic
def load(typingctx, x, i):
    """The vector x[i : i + LANES]."""

    def codegen(context, builder, sig, args):
        return builder.load(_at(builder, args, _floats), align=4)

    return vector(_pointer_type, types.intp), codegen


@intrinsic
def load_codes(typingctx, x, i):
    """The vector of the int8 numbers x[i : i + LANES]."""

    def codegen(context, builder, sig, args):
        codes = builder.load(_at(builder, args, ir.VectorType(ir.IntType(8), LANES)), align=1)
        return builder.sitofp(builder.sext(codes, _ints), _floats)

    return vector(types.CPointer(types.int8), types.intp), codegen


@intrinsic
def largest_bits(typingctx, x, i):
    """Bits of the largest magnitude of the BLOCK numbers from x[i] on; infinity has 0x7F800000, and NaN more."""

    def codegen(context, builder, sig, args):
        sizes = [
            builder.and_(builder.bitcast(part, _ints), ir.Constant(_ints, [0x7FFFFFFF] * LANES))
            for part in _parts(builder, args, _floats)
        ]
        most = sizes[0]
        for other in sizes[1:]:
            most = builder.select(builder.icmp_signed(">", most, other), most, other)
        kind = ir.FunctionType(_int, [_ints])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.smax.v{LANES}i32")
        return builder.sext(builder.call(function, [most]), ir.IntType(64))

    return types.int64(_pointer_type, types.intp), codegen


@intrinsic
def store_dithered(typingctx, codes, x, i, scale_bits, first, step):
    """The BLOCK int8 numbers from codes[i] on = those of x times a scale, given by its bits, up or down by a pattern.

    That is what first + n * step, in 2^32nds, is beyond a whole number for the n-th of them, in 16 bits.
    """

    def codegen(context, builder, sig, args):
        codes, x, i, *numbers = args
        scale_bits, first, step = (builder.trunc(number, _int) for number in numbers)
        scale = broadcast(builder, builder.bitcast(scale_bits, _float))
        kind = ir.VectorType(ir.IntType(8), LANES)
        most = ir.Constant(_floats, [127.0] * LANES)
        half, unit = ir.Constant(_ints, [16] * LANES), ir.Constant(_floats, [2.0**-16] * LANES)
        places = builder.add(
            broadcast(builder, first), builder.mul(broadcast(builder, step), ir.Constant(_ints, [*range(LANES)]))
        )
        far = broadcast(builder, builder.mul(step, _int(LANES)))
        for n, part in enumerate(_parts(builder, [x, i], _floats)):
            pattern = builder.fmul(builder.sitofp(builder.lshr(places, half), _floats), unit)
            size = call_on_lanes(builder, "llvm.fabs", part)
            near = call_on_lanes(builder, "llvm.floor", call_on_lanes(builder, "llvm.fmuladd", size, scale, pattern))
            near = builder.select(builder.fcmp_ordered("<", near, most), near, most)
            near = call_on_lanes(builder, "llvm.copysign", near, part)
            whole = builder.trunc(builder.fptosi(near, _ints), kind)
            place = builder.add(i, ir.Constant(i.type, n * LANES))
            builder.store(whole, _at(builder, [codes, place], kind), align=1)
            places = builder.add(places, far)
        return context.get_dummy_value()

    numbers = types.int64, types.int64, types.int64
    return types.void(types.CPointer(types.int8), _pointer_type, types.intp, *numbers), codegen


@intrinsic
def load_scaled(typingctx, x, codes, i, scale_bits):
    """The BLOCK numbers from x[i] on = those of codes times a scale, given by its bits."""

    def codegen(context, builder, sig, args):
        x, codes, i, scale_bits = args
        scale = broadcast(builder, builder.bitcast(builder.trunc(scale_bits, _int), _float))
        kind = ir.VectorType(ir.IntType(8), LANES)
        for n, part in enumerate(_parts(builder, [codes, i], kind, align=1)):
            numbers = builder.fmul(builder.sitofp(builder.sext(part, _ints), _floats), scale)
            place = builder.add(i, ir.Constant(i.type, n * LANES))
            builder.store(numbers, _at(builder, [x, place], _floats), align=4)
        return context.get_dummy_value()

    return types.void(_pointer_type, types.CPointer(types.int8), types.intp, types.int64), codegen


@intrinsic
def prefetch(typingctx, x, i):
    """Have x[i] and its cache line fetched; an address that is not there does no harm."""

    def codegen(context, builder, sig, args):
        fetch(builder, _at(builder, args, ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(_pointer_type, types.intp), codegen


@intrinsic
def store(typingctx, x, i, value):
    """x[i : i + LANES] = value."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], _at(builder, args, _floats), align=4)
        return context.get_dummy_value()

    return types.void(_pointer_type, types.intp, vector), codegen


@intrinsic
def load_first(typingctx, x, i, n):
    """x[i : i + n] and zeros; n < LANES. Numbers beyond are not touched."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(_floats, [ir.PointerType(_floats), _int, _masks, _floats])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
        zeros = ir.Constant(_floats, [0.0] * LANES)
        return builder.call(function, [_at(builder, args, _floats), _int(4), _mask(builder, args[2]), zeros])

    return vector(_pointer_type, types.intp, types.intp), codegen


@intrinsic
def store_first(typingctx, x, i, value, n):
    """x[i : i + n] = the first n numbers of value; n < LANES."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [_floats, ir.PointerType(_floats), _int, _masks])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{LANES}f32.p0")
        builder.call(function, [args[2], _at(builder, args, _floats), _int(4), _mask(builder, args[3])])
        return context.get_dummy_value()

    return types.void(_pointer_type, types.intp, vector, types.intp), codegen


@intrinsic
def store_fours(typingctx, x, i, j, value):
    """x[i : i + 4] and x[j : j + 4] = the first and the second four lanes of value."""

    def codegen(context, builder, sig, args):
        x, *places, value = args
        for first, place in zip((0, 4), places, strict=True):
            lanes = ir.Constant(ir.VectorType(_int, 4), [first + lane for lane in range(4)])
            part = builder.shuffle_vector(value, value, lanes)
            builder.store(part, _at(builder, [x, place], part.type), align=4)
        return context.get_dummy_value()

    return types.void(_pointer_type, types.intp, types.intp, vector), codegen


@intrinsic
def load_short(typingctx, address, i):
    """The vector of the bf16 numbers from the i-th on at an address."""

    def codegen(context, builder, sig, args):
        bits = builder.zext(builder.load(_short_at(builder, args), align=2), _ints)
        return builder.bitcast(builder.shl(bits, ir.Constant(_ints, [16] * LANES)), _floats)

    return vector(types.int64, types.intp), codegen


@intrinsic
def store_short(typingctx, address, i, value):
    """The bf16 numbers from the i-th on at an address = a vector, to nearest, ties to even; NaN stays NaN."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[2], _ints)
        half = ir.Constant(_ints, [16] * LANES)
        odd = builder.and_(builder.lshr(bits, half), ir.Constant(_ints, [1] * LANES))
        near = builder.lshr(builder.add(builder.add(bits, ir.Constant(_ints, [0x7FFF] * LANES)), odd), half)
        is_number = builder.fcmp_ordered("ord", args[2], args[2])
        near = builder.select(is_number, near, ir.Constant(_ints, [0x7FC0] * LANES))
        builder.store(builder.trunc(near, _shorts), _short_at(builder, args), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.intp, vector), codegen


@intrinsic
def splat(typingctx, x, i):
    """x[i] in every lane."""

    def codegen(context, builder, sig, args):
        return broadcast(builder, builder.load(_at(builder, args, _float)))

    return vector(_pointer_type, types.intp), codegen


@intrinsic
def fill(typingctx, x):
    """One number in every lane."""

    def codegen(context, builder, sig, args):
        return broadcast(builder, args[0])

    return vector(types.float32), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once where the machine can."""

    def codegen(context, builder, sig, args):
        return call_on_lanes(builder, "llvm.fmuladd", *args)

    return vector(vector, vector, vector), codegen


@intrinsic
def total(typingctx, a):
    """The sum of all lanes."""

    def codegen(context, builder, sig, args):
        x, half = args[0], LANES // 2
        while half:
            mask = ir.Constant(_ints, [(i + half) % LANES for i in range(LANES)])
            x = builder.fadd(x, builder.shuffle_vector(x, ir.Constant(_floats, ir.Undefined), mask))
            half //= 2
        return builder.extract_element(x, ir.Constant(_int, 0))

    return types.float32(vector), codegen


@intrinsic
def totals(typingctx, a, b, c, d, e, f, g, h):
    """The sums of eight vectors, in the first eight lanes."""

    def codegen(context, builder, sig, args):
        rows = list(args)
        # Add neighbours of two vectors at a time: lanes at distance 1, then 2, then 4.
        for distance in (1, 2, 4):
            even = [i if not i & distance else i - distance + LANES for i in range(LANES)]
            odd = [i + distance for i in even]
            rows = [
                builder.fadd(
                    builder.shuffle_vector(x, y, ir.Constant(_ints, even)),
                    builder.shuffle_vector(x, y, ir.Constant(_ints, odd)),
                )
                for x, y in zip(rows[::2], rows[1::2], strict=True)
            ]
        sums = rows[0]
        if LANES == 16:
            other_half = ir.Constant(_ints, [(i + 8) % 16 for i in range(16)])
            sums = builder.fadd(sums, builder.shuffle_vector(sums, sums, other_half))
        return sums

    return vector(*[vector] * 8), codegen


@intrinsic
def _round(typingctx, a):
    def codegen(context, builder, sig, args):
        return call_on_lanes(builder, "llvm.rint", args[0])

    return vector(vector), codegen


@intrinsic
def _power_of_two(typingctx, n):
    """2**n for whole n in [-126, 127], made of its exponent bits."""

    def codegen(context, builder, sig, args):
        biased = builder.add(builder.fptosi(args[0], _ints), ir.Constant(_ints, [127] * LANES))
        return builder.bitcast(builder.shl(biased, ir.Constant(_ints, [23] * LANES)), _floats)

    return vector(vector), codegen


@intrinsic
def choose_below(typingctx, a, b, low, high):
    """low where a < b, high elsewhere, NaN included."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return vector(vector, vector, vector, vector), codegen


def _arithmetic(symbol, method: str) -> None:
    @infer_global(symbol)  # pyright: ignore[reportOptionalCall]
    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            return signature(vector, vector, vector) if args == (vector, vector) else None

    @_extending.lower_builtin(symbol, vector, vector)
    def lower(context, builder, sig, args):
        return getattr(builder, method)(*args)


for _symbol, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_symbol, _method)


@njit(nogil=True, forceinline=True)
def exp(x):
    """e**x for x <= 0, to about one unit in the last place: 1 at 0, 0 at -inf, NaN at NaN; and up to 88, inf beyond.

    x = n log 2 + r with |r| <= log(2) / 2; e**r by the polynomial of Cephes' expf.
    """
    n = _round(x * fill(types.float32(1.44269504088896341)))
    r = fma(n, fill(types.float32(-0.693359375)), x)
    r = fma(n, fill(types.float32(2.12194440e-4)), r)
    p = fma(fill(types.float32(1.9875691500e-4)), r, fill(types.float32(1.3981999507e-3)))
    p = fma(p, r, fill(types.float32(8.3334519073e-3)))
    p = fma(p, r, fill(types.float32(4.1665795894e-2)))
    p = fma(p, r, fill(types.float32(1.6666665459e-1)))
    p = fma(p, r, fill(types.float32(5.0000001201e-1)))
    p = fma(p, r * r, r) + fill(types.float32(1.0))
    # Below, 2**n is no normal number any more, and n and r are garbage at -inf.
    smallest, largest = fill(types.float32(-87.0)), fill(types.float32(88.37))
    result = choose_below(x, smallest, fill(types.float32(0.0)), p * _power_of_two(n))
    return choose_below(largest, x, fill(types.float32(_INFINITY)), result)


def _at(builder, args, pointee):
    return builder.bitcast(builder.gep(args[0], [args[1]]), ir.PointerType(pointee))


def _short_at(builder, args):
    address = builder.add(args[0], builder.mul(args[1], ir.Constant(ir.IntType(64), 2)))
    return builder.inttoptr(address, ir.PointerType(_shorts))


def _parts(builder, args, kind, align: int = 4):
    """The vectors of a block."""
    x, i = args
    places = (builder.add(i, ir.Constant(i.type, first)) for first in range(0, BLOCK, LANES))
    return [builder.load(_at(builder, [x, place], kind), align=align) for place in places]


def _mask(builder, n):
    lanes = ir.Constant(_ints, list(range(LANES)))
    first = builder.insert_element(ir.Constant(_ints, ir.Undefined), builder.trunc(n, _int), _int(0))
    n = builder.shuffle_vector(first, first, ir.Constant(_ints, [0] * LANES))
    return builder.icmp_signed("<", lanes, n)


def broadcast(builder, scalar, lanes: int = LANES):
    """In code that is made: a number in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_int, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_int, lanes), [0] * lanes))


def fetch(builder, place) -> None:
    """In code that is made: `prefetch`, of the byte that a pointer points to."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(ir.IntType(8)), _int, _int, _int])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [place, _int(0), _int(3), _int(1)])


def call_on_lanes(builder, name: str, *args):
    """In code that is made: one of LLVM's own functions of vectors of float32."""
    kind = ir.FunctionType(_floats, [_floats] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{LANES}f32"), args)
