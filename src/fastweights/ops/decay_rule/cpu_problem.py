"""What the kernels of the decay rule are given, and their gates in scratch.

Notation
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    f, z     key-side and value-side gates, in [0, 1]; a scalar z is folded into f
    log_f, log_z   their logs, as tensors have them
"""

from __future__ import annotations

from typing import NamedTuple

from numba import float32
from numba.extending import register_jitable

from ..numba.rows import clear
from ..numba.staging import offset, stage, stage_gate
from ..numba.vectors import LANES, exp, fill, inner, load, pointer, shift, splat, store


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
    log_f: int
    log_f_strides: tuple[int, int, int]
    log_z: int
    log_z_strides: tuple[int, int, int]
    initial_state: int
    checkpoints: int
    guard: int
    """Numbers in each guard of the scratch (scratch.py)."""


@register_jitable
def has_key_gate(p):
    """Whether there are gates f; a scalar z is one of them."""
    return p.Kf > 0 or (p.Vz == 1 and p.V != 1)


@register_jitable
def has_value_gate(p):
    """Whether there are gates z, one for each value column."""
    return p.Vz == p.V


@inner
def stage_value_gate(out, p, u, token, rows):
    """z of `rows` tokens."""
    x = shift(pointer(p.log_z), offset(p.log_z_strides, u.batch, token, u.head) + u.column)
    stage_gate(out, u.Vp, x, p.log_z_strides[1], u.columns, rows)


@inner
def stage_key_gate(out, p, u, token, rows):
    """f of `rows` tokens, times z where that is a scalar: their logs are added, and ones are made up for no gate."""
    if p.Kf == p.K:
        x = shift(pointer(p.log_f), offset(p.log_f_strides, u.batch, token, u.head))
        stage(out, u.Kp, u.Kp, x, p.log_f_strides[1], p.K, rows, float32(1.0))
    else:
        clear(out, rows * u.Kp)
    for t in range(rows):
        scalar = fill(float32(0.0))
        if p.Kf == 1 and p.K != 1:
            scalar = splat(pointer(p.log_f), offset(p.log_f_strides, u.batch, token + t, u.head))
        if p.Vz == 1 and p.V != 1:
            scalar = scalar + splat(pointer(p.log_z), offset(p.log_z_strides, u.batch, token + t, u.head))
        row = shift(out, t * u.Kp)
        for i in range(0, u.Kp, LANES):
            store(row, i, exp(load(row, i) + scalar))
