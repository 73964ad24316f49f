"""The kernel of `losses_and_derivatives`; importing this compiles it (`runtime.load_kernels`).

A row of each model is brought to scratch, where the second-level cache holds it: logits less the largest of them, then
their exponentials, then the derivative,

    d_j = ((w + c) q_j - c p_j - w [j is the label]) / n

with w the weight of the row's cross-entropy, c that of all divergences, q the model's distribution and p the other's.

Notation
    s, t     a row of the model's logits and of the other's; then their exponentials
    v        tokens of the vocabulary; the last vector of a row overlaps the one before where they fill no whole one
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from numba import float32, float64, int64, njit, types
from numba.extending import register_jitable

from ..numba.runtime import sources_version
from ..numba.staging import round_up
from ..numba.vectors import (
    LANES,
    choose_below,
    exp,
    fill,
    fma,
    inner,
    integer_at,
    load,
    load_short,
    place,
    pointer,
    record_at,
    store,
    store_short,
    total,
)

_LEAST = float("-inf")


class Problem(NamedTuple):
    """Sizes, and addresses of contiguous tensors."""

    logits: int
    truth: int
    """0 for none."""
    labels: int
    weights: int
    n: int
    v: int
    short: int
    """Whether logits are bf16, and not float32."""
    guard: int
    """Numbers in each guard of the scratch."""


class Results(NamedTuple):
    """Addresses of what is written: a float32 for each row, and rows like the logits."""

    losses: int
    derivatives: int


class Buffers(NamedTuple):
    """Scratch: how many numbers each buffer has or, in the kernel, where it starts."""

    s: int
    t: int
    most: int


@register_jitable
def buffer_sizes(v):
    """Room for a row of each, with a vector behind it."""
    return Buffers(s=round_up(v, LANES) + LANES, t=round_up(v, LANES) + LANES, most=LANES)


@inner
def _load(p, at, i):
    return load_short(at, i) if p.short else load(pointer(at), i)


@inner
def _stage(p, row, at, most):
    """A row in scratch, with -inf behind it; the largest number, NaN if there is one in its place."""
    largest, last = fill(float32(_LEAST)), p.v - LANES
    for i in range(0, p.v, LANES):
        first = min(i, last)
        x = _load(p, at, first)
        store(row, first, x)
        largest = choose_below(largest, x, x, largest)
    store(row, p.v, fill(float32(_LEAST)))
    store(most, 0, largest)
    result = most[0]
    for i in range(1, LANES):
        result = max(result, most[i])
    return result


@inner
def _exponentials(row, v, less):
    """Of a row less a number, in its place; their sum."""
    m, sums = fill(less), fill(float32(0.0))
    for i in range(0, v, LANES):
        e = exp(load(row, i) - m)
        store(row, i, e)
        sums = sums + e
    return float64(total(sums))


@inner
def _both_exponentials(s, t, v, less_s, less_t):
    """Of two rows; their sums, and that of the second's times how much its logits are above the first's."""
    ms, mt, zero = fill(less_s), fill(less_t), fill(float32(0.0))
    sums_s, sums_t, dots = zero, zero, zero
    for i in range(0, v, LANES):
        x, y = load(s, i) - ms, load(t, i) - mt
        e, f = exp(x), exp(y)
        store(s, i, e)
        store(t, i, f)
        sums_s, sums_t = sums_s + e, sums_t + f
        dots = dots + choose_below(zero, f, f * (y - x), zero)  # 0 times infinity is nothing that can be
    return float64(total(sums_s)), float64(total(sums_t)), float64(total(dots))


@inner
def _store_derivatives(p, to, s, t, a, b):
    """a s - b t"""
    fa, fb, last = fill(a), fill(-b), p.v - LANES
    for i in range(0, p.v, LANES):
        first = min(i, last)
        d = load(s, first) * fa
        if p.truth != 0:
            d = fma(load(t, first), fb, d)
        if p.short:
            store_short(to, first, d)
        else:
            store(pointer(to), first, d)


@njit(nogil=True, error_model="numpy")
def _losses_and_derivatives(problem, results, scratch, kl_weight, first_row, end_row):
    p, out = record_at(problem, Problem), record_at(results, Results)
    b = place(pointer(scratch), buffer_sizes(p.v), p.guard)
    size = 2 if p.short else 4
    for r in range(first_row, end_row):
        row = r * p.v * size
        most = _stage(p, b.s, p.logits + row, b.most)
        label, weight = integer_at(p.labels, r), pointer(p.weights)[r]
        of_label = float64(b.s[label]) - float64(most)
        loss, of_model, of_other = 0.0, 0.0, 0.0
        if p.truth != 0:
            largest = _stage(p, b.t, p.truth + row, b.most)
            sum_s, sum_t, dot = _both_exponentials(b.s, b.t, p.v, most, largest)
            loss = kl_weight * (dot / sum_t + math.log(sum_s) - math.log(sum_t))
            of_model, of_other = kl_weight / sum_s / p.n, kl_weight / sum_t / p.n
        else:
            sum_s = _exponentials(b.s, p.v, most)
        if weight > 0:
            loss += weight * (math.log(sum_s) - of_label)
            of_model += weight / sum_s / p.n
            b.s[label] -= float32(weight / p.n / of_model)
        pointer(out.losses)[r] = float32(loss)
        _store_derivatives(p, out.derivatives + row, b.s, b.t, float32(of_model), float32(of_other))


def _compile(version: int):
    @njit(types.void(int64, int64, int64, float64, int64, int64), nogil=True, cache=True)
    def losses_and_derivatives(problem, results, scratch, kl_weight, first_row, end_row):
        _ = version
        _losses_and_derivatives(problem, results, scratch, kl_weight, first_row, end_row)

    return losses_and_derivatives


losses_and_derivatives = _compile(sources_version(Path(__file__).parent))
