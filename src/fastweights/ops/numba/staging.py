"""What the kernels are given, and copies between tensors and scratch.

Scratch rows are padded with zeros to whole vectors, so the kernels have no remainders to handle and
see neither strides nor logs.

Notation
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    f, z     key-side and value-side gates; in tensors their logs. A scalar value gate is folded into f
"""

from __future__ import annotations

from typing import NamedTuple

from numba import float32, njit
from numba.extending import register_jitable

from . import checkpoints
from .vectors import (
    LANES,
    exp,
    fill,
    integer_at,
    load,
    load_first,
    pointer,
    prefetch,
    shift,
    splat,
    store,
    store_first,
)

first_checkpoint = register_jitable(checkpoints.first_checkpoint)

LINE = 16
"""Numbers in a line of the processor's cache."""
COLUMNS = 2 * LANES
"""Value columns of a register tile; Vp is a multiple of it."""


class Problem(NamedTuple):
    """Sizes and float32 tensors: each an address, 0 if there is none, and its strides.

    Strides are those of batch, token and head, in numbers; the last dimension is contiguous.
    """

    T: int
    G: int
    R: int
    K: int
    V: int
    parts: int
    """Into how many parts a head's value columns are split."""
    inclusive: int
    Kf: int
    """Width of the key gate: K, 1 for one gate per head, 0 for none."""
    Vz: int
    """Likewise of the value gate."""
    cu_seqlens: int
    """Address of the int64 bounds of packed sequences, or 0."""
    q: int
    q_strides: tuple[int, int, int]
    k: int
    k_strides: tuple[int, int, int]
    v: int
    v_strides: tuple[int, int, int]
    f: int
    f_strides: tuple[int, int, int]
    z: int
    z_strides: tuple[int, int, int]
    initial_state: int
    checkpoints: int
    guard: int = 0
    """Numbers in each guard of the scratch (scratch.py)."""


@register_jitable
def round_up(width, multiple):
    """The next multiple."""
    return (width + multiple - 1) // multiple * multiple


@register_jitable
def part_width(V, parts):
    """Value columns of each part but the last; rounding up may leave fewer parts than asked for."""
    return round_up((V + parts - 1) // parts, COLUMNS)


@njit(nogil=True)
def offset(strides, batch, token, head):
    """Where a row starts in its tensor."""
    return batch * strides[0] + token * strides[1] + head * strides[2]


@njit(nogil=True)
def sequence(p, n):
    """(batch row, first token, end, index of the first checkpoint) of sequence n."""
    packed = p.cu_seqlens != 0
    batch, start, end = n, 0, p.T
    if packed:
        batch, start, end = 0, integer_at(p.cu_seqlens, n), integer_at(p.cu_seqlens, n + 1)
    return batch, start, end, first_checkpoint(n, start, p.T, packed)


@njit(nogil=True)
def clear(out, size):
    """out = 0"""
    zero = fill(float32(0.0))
    for i in range(0, size, LANES):
        store(out, i, zero)


@njit(nogil=True)
def fill_ones(out, size):
    """out = 1"""
    one = fill(float32(1.0))
    for i in range(0, size, LANES):
        store(out, i, one)


@njit(nogil=True)
def multiply(out, x, y, size):
    """out = x * y; `out` may be either of them"""
    for i in range(0, size, LANES):
        store(out, i, load(x, i) * load(y, i))


@njit(nogil=True, forceinline=True)
def _fetch(row, width):
    """Have a row, which the next block of as many rows will want, on its way from memory."""
    for i in range(0, width, LINE):
        prefetch(row, i)


@njit(nogil=True)
def stage(out, out_stride, padded, x, stride, width, rows, scale):
    """Copy rows of a tensor to scratch, scaled; zeros from `width` to `padded`."""
    s = fill(scale)
    zero = fill(float32(0.0))
    whole = width // LANES * LANES
    for t in range(rows):
        to, source = shift(out, t * out_stride), shift(x, t * stride)
        _fetch(shift(source, rows * stride), width)
        for i in range(0, whole, LANES):
            store(to, i, load(source, i) * s)
        for i in range(whole, padded, LANES):
            store(to, i, zero)
        if whole < width:
            store(to, whole, load_first(source, whole, width - whole) * s)


@njit(nogil=True)
def unstage(x, stride, width, rows, out, out_stride):
    """Copy scratch rows back to a tensor."""
    whole = width // LANES * LANES
    for t in range(rows):
        to, source = shift(x, t * stride), shift(out, t * out_stride)
        _fetch(shift(to, rows * stride), width)
        for i in range(0, whole, LANES):
            store(to, i, load(source, i))
        if whole < width:
            store_first(to, whole, load(source, whole), width - whole)


@njit(nogil=True)
def stage_gate(out, padded, x, stride, width, rows):
    """Like `stage`, but the exponential; 1 in the padding."""
    stage(out, padded, padded, x, stride, width, rows, float32(1.0))
    for i in range(0, rows * padded, LANES):
        store(out, i, exp(load(out, i)))


@njit(nogil=True)
def stage_key_gate(out, padded, p, batch, head, token, rows):
    """f of `rows` tokens, times z where that is a scalar: logs are added, and ones are made up for no gate."""
    if p.Kf == p.K:
        x = shift(pointer(p.f), offset(p.f_strides, batch, token, head))
        stage(out, padded, padded, x, p.f_strides[1], p.K, rows, float32(1.0))
    else:
        clear(out, rows * padded)
    for t in range(rows):
        scalar = fill(float32(0.0))
        if p.Kf == 1 and p.K != 1:
            scalar = splat(pointer(p.f), offset(p.f_strides, batch, token + t, head))
        if p.Vz == 1 and p.V != 1:
            scalar = scalar + splat(pointer(p.z), offset(p.z_strides, batch, token + t, head))
        row = shift(out, t * padded)
        for i in range(0, padded, LANES):
            store(row, i, exp(load(row, i) + scalar))
