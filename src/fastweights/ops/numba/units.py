"""What is one unit of a kernel's work, and its rows in tensors.

A *unit* of work is one key/value head of one sequence, or some value columns of it: units touch
nothing of each other's, so any number of threads may share them out.

Notation
    p        a rule's Problem (cpu_problem.py): sizes and tensors, each an address and its strides
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
"""

from __future__ import annotations

from typing import NamedTuple

from numba import float32
from numba.extending import register_jitable

from .staging import COLUMNS, offset, part_width, round_up, sequence, stage
from .vectors import LANES, inner, pointer, shift


class Unit(NamedTuple):
    """One unit of work."""

    part: int
    head: int
    """Key/value head."""
    batch: int
    start: int
    end: int
    """The sequence's tokens in its row."""
    checkpoint: int
    """Index of the sequence's first checkpoint."""
    column: int
    columns: int
    """The unit's first value column, and how many it has."""
    Kp: int
    Vp: int
    state: int
    """Where the unit's state starts in a tensor of states (N, G, K, V)."""


@register_jitable
def unit_at(p, index):
    """The index-th unit."""
    part, head, n = index % p.parts, index // p.parts % p.G, index // p.parts // p.G
    batch, start, end, checkpoint = sequence(p, n)
    width = part_width(p.V, p.parts)
    column = part * width
    columns = min(width, p.V - column)
    state = (n * p.G + head) * p.K * p.V + column
    Kp, Vp = round_up(p.K, LANES), round_up(columns, COLUMNS)
    return Unit(part, head, batch, start, end, checkpoint, column, columns, Kp, Vp, state)


@register_jitable
def checkpoint_at(p, u, segment):
    """Where a unit's state at the start of its segment lies in the checkpoints (., G, K, V)."""
    return ((u.checkpoint + segment) * p.G + u.head) * p.K * p.V + u.column


@register_jitable
def late_reads(p):
    """1 if reads are exclusive: that of token t is an inclusive one of token t - 1, or one of the initial state."""
    return 1 - p.inclusive


@inner
def stage_keys(out, p, u, token, rows):
    """Copy k of `rows` tokens to scratch."""
    x = shift(pointer(p.k), offset(p.k_strides, u.batch, token, u.head))
    stage(out, u.Kp, u.Kp, x, p.k_strides[1], p.K, rows, float32(1.0))


@inner
def stage_values(out, p, u, token, rows):
    """Copy v of `rows` tokens to scratch."""
    x = shift(pointer(p.v), offset(p.v_strides, u.batch, token, u.head) + u.column)
    stage(out, u.Vp, u.Vp, x, p.v_strides[1], u.columns, rows, float32(1.0))


@inner
def stage_queries(out, p, u, r, token, rows, scale):
    """Copy q of `rows` tokens and the r-th query head to scratch, scaled."""
    x = shift(pointer(p.q), offset(p.q_strides, u.batch, token, u.head * p.R + r))
    stage(out, u.Kp, u.Kp, x, p.q_strides[1], p.K, rows, scale)
