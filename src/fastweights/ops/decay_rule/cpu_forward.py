"""Forward kernel of the decay rule on CPUs.

Decay costs as many multiplications as writing and reading together, unless it is put off: with F_t
and Z_t the products of the gates since some token,

    S_t = (F_t Z_t^T) * T_t      T_t = T_{t-1} + (k_t / F_t) (v_t / Z_t)^T      o_t = Z_t * T_t^T (F_t * q_t)

so T only grows, and gates touch rows alone. A product that leaves [RESCALE_BELOW, 1 / RESCALE_BELOW] is made
good on T, and the products start anew at 1; which token that happens at depends on the gates up to
it alone, and padding, whose gates are 1, changes nothing. So neither a later token nor padding
changes one bit of the result. Token by token, a tile of 4 x COLUMNS numbers of T stays in registers for
up to BLOCK tokens.

Notation
    R        query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    S        memory of the state: rows of V (or `width`) numbers for each of K keys
    T_t      what it holds: the state less its put-off decay (`_put_off_decay` divides k and v, tiles add them up)
    f, z     key-side and value-side gates, in [0, 1], then their products F and Z
    D, E     products that have yet to be made good on S
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from numba import float32, float64, int64, njit, types
from numba.extending import register_jitable

from ..numba.checkpoints import SEGMENT
from ..numba.rows import clear, copy, divide, fill_ones, multiply
from ..numba.runtime import sources_version
from ..numba.staging import COLUMNS, part_width, round_up, stage, unstage
from ..numba.units import checkpoint_at, late_reads, stage_keys, stage_queries, stage_values, unit_at
from ..numba.vectors import (
    LANES,
    choose_below,
    fill,
    fma,
    inner,
    load,
    place,
    pointer,
    record_at,
    shift,
    splat,
    store,
    store_first,
    total,
)
from .cpu_problem import Problem, has_key_gate, has_value_gate, stage_key_gate, stage_value_gate
from .cpu_tiles import BLOCK, tiles, tiles_of_groups

RESCALE_BELOW = 2.0**-16
"""Numbers in scratch are at most RESCALE_BELOW**-2 times those that they stand for: 4e9 of float32's 3e38."""


class Outputs(NamedTuple):
    """Addresses that the kernel writes: contiguous o (B, T, H, V) and state (N, G, K, V)."""

    o: int
    final_state: int


class Buffers(NamedTuple):
    """Scratch of the kernel: how many numbers each buffer has or, in the kernel, where it starts."""

    k: int
    f: int
    q: int
    v: int
    z: int
    o: int
    D: int
    F: int
    E: int
    Z: int
    padded_state: int


@register_jitable
def buffer_sizes(K, V, R, parts):
    """The kernel's buffers; each has whole vectors."""
    Kp, Vp = round_up(K, LANES), part_width(V, parts)
    return Buffers(
        k=BLOCK * Kp,
        f=BLOCK * Kp,
        q=R * BLOCK * Kp,
        v=BLOCK * Vp,
        z=BLOCK * Vp,
        o=R * BLOCK * Vp,
        D=Kp,
        F=Kp,
        E=Vp,
        Z=Vp,
        padded_state=Kp * Vp,
    )


@inner
def _accumulate(product, gate, width, smallest):
    """gate = product * gate; whether a number of it has left [smallest, 1 / smallest], or is none."""
    low, high = fill(smallest), fill(float32(1.0) / smallest)
    zero, one = fill(float32(0.0)), fill(float32(1.0))
    outside = zero
    for i in range(0, width, LANES):
        x = load(product, i) * load(gate, i)
        outside = outside + choose_below(x, low, one, zero) + choose_below(high, x, one, zero) + (x - x)
        store(gate, i, x)
    return not total(outside) <= float32(0.0)  # x - x is NaN for NaN, which compares to nothing


@inner
def _decay(out, stride, S, width, K, columns, D, E):
    """out = (D E^T) * S; `out` may be S itself."""
    whole = columns // LANES * LANES
    for key in range(K):
        d = splat(D, key)
        to, row = shift(out, key * stride), shift(S, key * width)
        for i in range(0, whole, LANES):
            store(to, i, load(row, i) * (d * load(E, i)))
        if whole < columns:
            store_first(to, whole, load(row, whole) * (d * load(E, whole)), columns - whole)


@inner
def _write_and_read(b, u, R, S, width, decays, first, end):
    """The tiles for tokens `first` to `end` of a block."""
    i, j, rows = first * u.Kp, first * u.Vp, end - first
    k, q, v, o = shift(b.k, i), shift(b.q, i), shift(b.v, j), shift(b.o, j)
    if R == 1:
        tiles(S, width, decays, b.D, b.E, k, q, u.Kp, v, o, u.Vp, rows, R)
    else:
        tiles_of_groups(S, width, decays, b.D, b.E, k, q, u.Kp, v, o, u.Vp, rows, R)


@inner
def _read(o, S, width, q, K, Vp):
    """o = S^T q, added up in the order of the tiles."""
    for value in range(0, Vp, LANES):
        total = fill(float32(0.0))
        for key in range(K):
            total = fma(splat(q, key), load(S, key * width + value), total)
        store(o, value, total)


@inner
def _first_state(p, out, b, u):
    """(state, numbers from row to row): the final state's own memory if tiles fit it, else padded scratch."""
    S, width = shift(pointer(out.final_state), u.state), p.V
    if not _in_place(p, u):
        S, width = b.padded_state, u.Vp
        clear(S, u.Kp * u.Vp)
    if p.initial_state != 0:
        stage(S, width, u.Vp, shift(pointer(p.initial_state), u.state), p.V, u.columns, p.K, float32(1.0))
    else:
        for i in range(p.K):
            clear(shift(S, i * width), u.Vp)
    return S, width


@register_jitable
def _in_place(p, u):
    return p.K % LANES == 0 and u.columns % COLUMNS == 0


@inner
def _output(p, out, u, r, token):
    """Where o of a token and the r-th query head is written."""
    row = (u.batch * p.T + token) * p.G + u.head
    return shift(pointer(out.o), (row * p.R + r) * p.V + u.column)


@inner
def _read_initial_state(p, out, b, u, S, width, scale):
    """The exclusive read of the first token."""
    single = late_reads(p)
    for r in range(p.R):
        stage_queries(b.q, p, u, r, u.start, single, scale)
        _read(b.o, S, width, b.q, p.K, u.Vp)
        unstage(_output(p, out, u, r, u.start), p.V, u.columns, single, b.o, u.Vp)


@inner
def _stage_block(p, b, u, token, rows, reads, scale):
    """k, v, gates and q of a block; o = 0."""
    stage_keys(b.k, p, u, token, rows)
    stage_values(b.v, p, u, token, rows)
    if has_key_gate(p):
        stage_key_gate(b.f, p, u, token, rows)
    if has_value_gate(p):
        stage_value_gate(b.z, p, u, token, rows)
    for r in range(p.R):
        q = shift(b.q, r * BLOCK * u.Kp)
        stage_queries(q, p, u, r, token + late_reads(p), reads, scale)
        clear(shift(q, reads * u.Kp), (rows - reads) * u.Kp)
        clear(shift(b.o, r * BLOCK * u.Vp), rows * u.Vp)


@inner
def _put_off_decay(p, b, u, S, width, rows, smallest, carried):
    """Turn a block's gates into their products F and Z since some token, and divide k and v, multiply q by them.

    Where products leave their bounds, the tokens before are written and read, and D and E take over the products.
    Returns the first token that has yet to be written, whether D and E have yet to be made good on S, the smallest
    product allowed from now on, and whether products other than 1 are carried.
    """
    first, decays = 0, False
    F, Z = b.F, b.Z
    for t in range(rows):
        f, z = shift(b.f, t * u.Kp), shift(b.z, t * u.Vp)
        over = False
        if has_key_gate(p):
            over = _accumulate(F, f, u.Kp, smallest)
        if has_value_gate(p):
            over = _accumulate(Z, z, u.Vp, smallest) or over
        if over:
            if first < t:
                _write_and_read(b, u, p.R, S, width, decays, first, t)
            first, decays, smallest = t, True, float32(RESCALE_BELOW)
            if has_key_gate(p):
                copy(b.D, f, u.Kp)
                fill_ones(f, u.Kp)
            if has_value_gate(p):
                copy(b.E, z, u.Vp)
                fill_ones(z, u.Vp)
        carried = not over and (carried or smallest < float32(1.0))
        if has_key_gate(p):
            F = f
            if carried:
                divide(shift(b.k, t * u.Kp), f, u.Kp)
                for r in range(p.R):
                    q = shift(b.q, (r * BLOCK + t) * u.Kp)
                    multiply(q, q, f, u.Kp)
        if has_value_gate(p):
            Z = z
            if carried:
                divide(shift(b.v, t * u.Vp), z, u.Vp)
    if has_key_gate(p):
        copy(b.F, F, u.Kp)
    if has_value_gate(p):
        copy(b.Z, Z, u.Vp)
    return first, decays, smallest, carried


@inner
def _write_outputs(p, out, b, u, token, reads):
    for r in range(p.R):
        o = shift(b.o, r * BLOCK * u.Vp)
        if has_value_gate(p):
            multiply(o, o, b.z, reads * u.Vp)
        to = _output(p, out, u, r, token + late_reads(p))
        unstage(to, p.G * p.R * p.V, u.columns, reads, o, u.Vp)


@njit(nogil=True, error_model="numpy")
def _forward(problem, outputs, scratch, factor, first_unit, end_unit):
    """o, the final state and, unless their address is 0, the checkpoints, for some units; takes addresses."""
    p, out = record_at(problem, Problem), record_at(outputs, Outputs)
    b = place(pointer(scratch), buffer_sizes(p.K, p.V, p.R, p.parts), p.guard)
    scale = float32(factor)
    for index in range(first_unit, end_unit):
        u = unit_at(p, index)
        S, width = _first_state(p, out, b, u)
        if late_reads(p) == 1 and u.start < u.end:
            _read_initial_state(p, out, b, u, S, width, scale)
        # Until the first token that decays, there is no product: one token alone needs but one pass over S.
        smallest, carried = float32(1.0), False
        fill_ones(b.F, u.Kp)
        fill_ones(b.Z, u.Vp)
        fill_ones(b.D, u.Kp)
        fill_ones(b.E, u.Vp)
        for token in range(u.start, u.end, BLOCK):
            if p.checkpoints != 0 and (token - u.start) % SEGMENT == 0:
                to = shift(pointer(p.checkpoints), checkpoint_at(p, u, (token - u.start) // SEGMENT))
                _decay(to, p.V, S, width, p.K, u.columns, b.F, b.Z)
            rows = min(BLOCK, u.end - token)
            reads = min(rows, u.end - token - late_reads(p))
            _stage_block(p, b, u, token, rows, reads, scale)
            first, decays = 0, False
            if has_key_gate(p) or has_value_gate(p):
                first, decays, smallest, carried = _put_off_decay(p, b, u, S, width, rows, smallest, carried)
            _write_and_read(b, u, p.R, S, width, decays, first, rows)
            _write_outputs(p, out, b, u, token, reads)
        if carried:
            _decay(S, width, S, width, p.K, u.columns, b.F, b.Z)
        if not _in_place(p, u):
            unstage(shift(pointer(out.final_state), u.state), p.V, u.columns, p.K, S, width)


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def forward(problem, outputs, scratch, scale, first_unit, end_unit):
        _ = version
        _forward(problem, outputs, scratch, scale, first_unit, end_unit)

    return forward


forward = _compile(sources_version(Path(__file__).parent))
