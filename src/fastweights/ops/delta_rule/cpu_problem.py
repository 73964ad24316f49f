"""What the kernels of the delta rule are given, and what it has for each token in scratch.

Notation
    G, R     key/value heads, query heads per key/value head
    K, V     key and value width
    a, b     decay, in [0, 1], and writing strength
    e        error: what the value is beyond what the state already gives for its key
"""

from __future__ import annotations

from typing import NamedTuple

from ..numba.rows import clear
from ..numba.staging import offset
from ..numba.vectors import LANES, exp, inner, load, pointer, store


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
    cu_seqlens: int
    """Address of the int64 bounds of packed sequences, or 0."""
    q: int
    q_strides: tuple[int, int, int]
    k: int
    k_strides: tuple[int, int, int]
    v: int
    v_strides: tuple[int, int, int]
    beta: int
    beta_strides: tuple[int, int, int]
    log_decay: int
    log_decay_strides: tuple[int, int, int]
    initial_state: int
    checkpoints: int
    errors: int
    """e of all tokens, contiguous (B, T, G, V): written by the forward kernel, read by the backward one."""
    guard: int
    """Numbers in each guard of the scratch (scratch.py)."""


@inner
def stage_beta(out, p, u, token, rows, size):
    """b of `rows` tokens; 0 from there to `size`."""
    clear(out, size)
    for t in range(rows):
        out[t] = pointer(p.beta)[offset(p.beta_strides, u.batch, token + t, u.head)]


@inner
def stage_decay(out, p, u, token, rows, size):
    """a of `rows` tokens; 1 from there to `size`, and everywhere if there is none."""
    clear(out, size)
    if p.log_decay != 0:
        for t in range(rows):
            out[t] = pointer(p.log_decay)[offset(p.log_decay_strides, u.batch, token + t, u.head)]
    for i in range(0, size, LANES):
        store(out, i, exp(load(out, i)))


@inner
def errors_at(p, u, token):
    """Where e of a token is."""
    return ((u.batch * p.T + token) * p.G + u.head) * p.V + u.column
