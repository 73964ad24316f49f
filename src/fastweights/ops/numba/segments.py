"""Segments of a backward kernel, and what it reads and writes for queries and outputs of any rule.

Notation
    p, d, b  a rule's Problem, its Gradients and its Buffers; u, s a unit and its segment
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width, in scratch padded to Kp and Vp
    g        scale * do
    dS       gradient of the state
"""

from __future__ import annotations

from typing import NamedTuple

from numba import float32
from numba.extending import register_jitable

from .checkpoints import SEGMENT
from .products import CHUNK
from .rows import clear, dot, spread
from .staging import offset, round_up, stage, unstage
from .units import late_reads, stage_queries
from .vectors import inner, pointer, shift


class Segment(NamedTuple):
    """Up to SEGMENT tokens of a sequence, from one checkpoint to the next."""

    token: int
    """The first."""
    rows: int
    reads: int
    """Reads of the states after these tokens; an exclusive one of the sequence's last state there is not."""
    staged: int
    """Rows in scratch: whole chunks."""
    index: int


@register_jitable
def segment_at(p, u, index):
    token = u.start + index * SEGMENT
    rows = min(SEGMENT, u.end - token)
    return Segment(token, rows, min(rows, u.end - token - late_reads(p)), round_up(rows, CHUNK), index)


@inner
def stage_reads(p, d, b, u, s, scale):
    """q and g = scale * do of each query head; zeros for reads that are not there."""
    missing = s.staged - s.reads
    token = s.token + late_reads(p)
    for r in range(p.R):
        q, g = shift(b.q, r * SEGMENT * u.Kp), shift(b.g, r * SEGMENT * u.Vp)
        stage_queries(q, p, u, r, token, s.reads, float32(1.0))
        clear(shift(q, s.reads * u.Kp), missing * u.Kp)
        _stage_output_gradient(g, p, d, u, r, token, s.reads, scale)
        clear(shift(g, s.reads * u.Vp), missing * u.Vp)


@inner
def _stage_output_gradient(out, p, d, u, r, token, rows, scale):
    """g = scale * do of `rows` tokens and the r-th query head."""
    if d.do == 0:
        clear(out, rows * u.Vp)
    else:
        x = shift(pointer(d.do), offset(d.do_strides, u.batch, token, u.head * p.R + r) + u.column)
        stage(out, u.Vp, u.Vp, x, d.do_strides[1], u.columns, rows, scale)


@inner
def _query_gradient(p, d, u, r, token):
    """Where dq of a token and the r-th query head is written."""
    row = u.part * d.tokens + u.batch * p.T + token
    return shift(pointer(d.dq), ((row * p.G + u.head) * p.R + r) * p.K)


@inner
def write_query_gradients(p, d, b, u, s):
    for r in range(p.R):
        dq = _query_gradient(p, d, u, r, s.token + late_reads(p))
        unstage(dq, p.G * p.R * p.K, p.K, s.reads, shift(b.dq, r * SEGMENT * u.Kp), u.Kp)


@inner
def first_read_back(p, d, b, u, scale):
    """The exclusive read of the first token: of the initial state, with which `states` starts."""
    single = late_reads(p)
    for r in range(p.R):
        stage_queries(b.row_k, p, u, r, u.start, single, float32(1.0))
        _stage_output_gradient(b.row_v, p, d, u, r, u.start, single, scale)
        for key in range(p.K):
            b.x[key] = dot(shift(b.states, key * u.Vp), b.row_v, u.Vp)
            spread(shift(b.dS, key * u.Vp), shift(b.row_k, key), b.row_v, single, u.Vp)
        unstage(_query_gradient(p, d, u, r, u.start), p.K, p.K, single, b.x, u.Kp)
