"""What lies between two matrix products of a step of decoding; importing this compiles it (`runtime.load_kernels`).

Notation
    B        rows, all at the same place of their texts
    H, G     query heads, key/value heads; R = H / G of the former read each of the latter
    D, K, V  width of a head in the window, of a key in the fast weights (here K = D), of a value
    W, S     window, sinks
    state    (K, V); with an average beside, (3K, V + 1), of which the first K rows and V columns are the delta rule's
    ring_k (B, G, D, W) has its keys one channel after another, so that sixteen of them are multiplied at once
    codes    numbers of a window in eight bits, with an exponent for each N = 32 channels (`layers/eight_bits.py`)
"""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, float32, int8, int32, njit

from ..numba.runtime import sources_version
from ..numba.vectors import (
    BLOCK,
    LANES,
    codes_at,
    fill,
    fma,
    integer_at,
    largest_bits,
    load,
    load_codes,
    load_scaled,
    pointer,
    store,
    store_dithered,
    take,
)

_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
"""Sums in any order, which lets them be vectors; infinities and NaN stay what they are."""
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_SHORTEST = np.float32(1e-12)
"""As torch.nn.functional.normalize has it."""
_LEAST_WEIGHT = np.float32(1e-6)
"""As rules with a normaliser have it."""
_LEAST_EXPONENT, _NOT_FINITE = -100, -128
_MOST = np.float32(127.0)
"""As numbers in eight bits have these."""
_NAN = int32(0x7FC00000)
_INFINITE = 0x7F800000
_MOST_MANTISSA = 0x7E0000
"""Of 127 steps of a block."""
_OF_ROW, _OF_COLUMN, _OF_TOKEN = 0xD1B54A33, 0xABC98389, 0x8CB92BA7
_INFINITY = np.float32(np.inf)
_GELU = np.float32(2 * math.sqrt(2 / math.pi))
_ERF_T = np.float32(0.3275911 * math.sqrt(0.5))
_ERF = tuple(np.float32(x) for x in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))
_EXP = tuple(np.float32(1 / math.factorial(n)) for n in (6, 5, 4, 3, 2))


def _kernel(signature: str) -> Any:
    return njit(signature, nogil=True, cache=True, fastmath=_FASTMATH, error_model="numpy")


_inner: Any = njit(nogil=True, fastmath=_FASTMATH, error_model="numpy", inline="never")


@_inner
def _exponentials(x):
    """x = exp(x) for numbers up to 0, to two units in the last place."""
    bits = x.view(np.int32)
    for i in range(x.shape[0]):
        value = max(x[i], float32(-87.0))
        n = np.floor(value * _LOG2E + float32(0.5))
        r = value - n * _LN2_HIGH - n * _LN2_LOW
        p = _EXP[0]
        p = p * r + _EXP[1]
        p = p * r + _EXP[2]
        p = p * r + _EXP[3]
        p = p * r + _EXP[4]
        p = p * r * r + r + float32(1.0)
        x[i] = p
        bits[i] += int32(n) << 23


@_inner
def _rotate(x, cos, sin, out):
    """out = x with rotary embedding of its first channels, of which the second half belongs to the first."""
    half = cos.shape[0] // 2
    for i in range(x.shape[0]):
        out[i] = x[i]
    for i in range(half):
        out[i] = x[i] * cos[i] - x[i + half] * sin[i]
        out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half]


@_inner
def _normalise(x, weight, epsilon, offset):
    total = float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = float32(1.0) / math.sqrt(total / float32(x.shape[0]) + epsilon)
    for i in range(x.shape[0]):
        x[i] = x[i] * factor * (offset + weight[i])


@_inner
def _convolve(x, taps, tail):
    """x = its short convolution with the tokens of the tail, the oldest first, to which x comes and the oldest goes."""
    room = taps.shape[1] - 1
    for i in range(x.shape[0]):
        now = x[i]
        value = taps[i, room] * now
        for j in range(room):
            value += taps[i, j] * tail[i, j]
        for j in range(room - 1):
            tail[i, j] = tail[i, j + 1]
        tail[i, room - 1] = now
        x[i] = value


@_inner
def _dot(x, y):
    total = float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@_inner
def _gate(logits, up, low, bias, first, keep, let_go):
    """keep = sigmoid of one head's gate: of `up` times what a low rank left, or of the logits; let_go = 1 - keep.

    The latter without a difference, which would have few digits where nearly all is kept.
    """
    for i in range(keep.shape[0]):
        value = bias[first + i] + _dot(up[first + i], low) if low.shape[0] > 0 else logits[first + i]
        keep[i], let_go[i] = value, -abs(value)
    _exponentials(let_go)
    for i in range(keep.shape[0]):
        small = let_go[i]  # exp(-|value|), which cannot overflow
        share = float32(1.0) / (float32(1.0) + small)
        positive = keep[i] >= 0
        keep[i] = share if positive else small * share
        let_go[i] = small * share if positive else share


@_inner
def _map(weight, head, x, out):
    """out = the head's matrix times x, or x where there are none."""
    first = head * out.shape[0]
    for i in range(out.shape[0]):
        out[i] = _dot(weight[first + i], x) if weight.shape[0] > 0 else x[i]


@_inner
def _softmaxes(weight, head, x, out):
    """out = [softmax(p), softmax(-p)] of the head's matrix times x."""
    width = out.shape[0] // 2
    up, down = out[:width], out[width:]
    _map(weight, head, x, up)
    most, least = up[0], up[0]
    for i in range(width):
        most, least = max(most, up[i]), min(least, up[i])
    for i in range(width):
        down[i] = least - up[i]
        up[i] -= most
    for part in (up, down):
        _exponentials(part)
        total = float32(0.0)
        for i in range(width):
            total += part[i]
        for i in range(width):
            part[i] /= total


def _rows_added(load_numbers):
    """out[j : j + 2 LANES] += weights^T x of these columns of rows of so many numbers, which a function loads.

    In vectors, as LLVM would look at each four rows whether arrays overlap.
    """

    @_inner
    def add(x, wide, weights, j, out):
        many = weights.shape[0]
        a = b = c = d = e = f = g = h = fill(float32(0.0))
        for w in range(0, many - 3, 4):
            at, p, q = w * wide + j, fill(weights[w]), fill(weights[w + 1])
            a = fma(p, load_numbers(x, at), a)
            b = fma(p, load_numbers(x, at + LANES), b)
            c = fma(q, load_numbers(x, at + wide), c)
            d = fma(q, load_numbers(x, at + wide + LANES), d)
            at, p, q = at + 2 * wide, fill(weights[w + 2]), fill(weights[w + 3])
            e = fma(p, load_numbers(x, at), e)
            f = fma(p, load_numbers(x, at + LANES), f)
            g = fma(q, load_numbers(x, at + wide), g)
            h = fma(q, load_numbers(x, at + wide + LANES), h)
        for w in range(many - many % 4, many):
            p = fill(weights[w])
            a = fma(p, load_numbers(x, w * wide + j), a)
            b = fma(p, load_numbers(x, w * wide + j + LANES), b)
        store(out, j, load(out, j) + ((a + c) + (e + g)))
        store(out, j + LANES, load(out, j + LANES) + ((b + d) + (f + h)))

    return add


_add_rows, _add_rows_of_codes = _rows_added(load), _rows_added(load_codes)


@_inner
def _add_weighted(v, weights, out):
    """out += weights^T v, of as many rows and columns of v as there are weights and outputs."""
    wide, columns = v.shape[1], out.shape[0]
    numbers, result = pointer(v.ctypes.data), pointer(out.ctypes.data)
    for j in range(0, columns - 2 * LANES + 1, 2 * LANES):
        _add_rows(numbers, wide, weights, j, result)
    for j in range(columns - columns % (2 * LANES), columns):
        for w in range(weights.shape[0]):
            out[j] += weights[w] * v[w, j]


@_inner
def _read_mean(state, q, first, share, fast_scale, fast_unit, read, out):
    """Add to what each query of a group is told a share of the average that the state has of what it asks for."""
    last = out.shape[1]
    for r in range(q.shape[0]):
        h = first + r
        for j in range(read.shape[0]):
            read[j] = float32(0.0)
        _add_weighted(state, q[r, : state.shape[0]], read)
        factor = share[h] * fast_scale[h] * fast_unit[h] / max(read[last], _LEAST_WEIGHT)
        for j in range(last):
            out[h, j] += read[j] * factor


@_inner
def _read(state, q, first, fast_scale, fast_unit, scale, read, out):
    """Add what the state says to each query of a group."""
    for r in range(q.shape[0]):
        h = first + r
        for j in range(read.shape[0]):
            read[j] = float32(0.0)
        _add_weighted(state, q[r, : state.shape[0]], read)
        factor = scale * fast_scale[h] * fast_unit[h]
        for j in range(read.shape[0]):
            out[h, j] += read[j] * factor


@_inner
def _write(state, f, z, k, v):
    """state = f z^T * state + k v^T; a gate may be one number for all channels."""
    for i in range(state.shape[0]):
        keep, key = f[i if f.shape[0] > 1 else 0], k[i]
        if z.shape[0] > 1:
            for j in range(state.shape[1]):
                state[i, j] = state[i, j] * (keep * z[j]) + key * v[j]
        else:
            keep *= z[0]
            for j in range(state.shape[1]):
                state[i, j] = state[i, j] * keep + key * v[j]


@_inner
def _write_by_delta(state, keep, strength, k, v, error):
    """state = keep * state + strength k (v - keep * state^T k)^T, k at length 1, or 0, in the columns that v has."""
    length = max(math.sqrt(_dot(k, k)), _SHORTEST)
    for i in range(k.shape[0]):
        k[i] /= length
    for j in range(error.shape[0]):
        error[j] = float32(0.0)
    _add_weighted(state, k, error)
    for j in range(error.shape[0]):
        error[j] = strength * (v[j] - keep * error[j])
    for i in range(state.shape[0]):
        for j in range(error.shape[0]):
            state[i, j] = state[i, j] * keep + k[i] * error[j]


@_inner
def _times(q, k, scale, out):
    """out = scale * k^T q for the first columns of k, as many as there are."""
    for w in range(out.shape[0]):
        out[w] = float32(0.0)
    for i in range(0, q.shape[0] - 3, 4):
        q0, q1, q2, q3 = q[i] * scale, q[i + 1] * scale, q[i + 2] * scale, q[i + 3] * scale
        for w in range(out.shape[0]):
            out[w] += q0 * k[i, w] + q1 * k[i + 1, w] + q2 * k[i + 2, w] + q3 * k[i + 3, w]
    for i in range(q.shape[0] - q.shape[0] % 4, q.shape[0]):
        for w in range(out.shape[0]):
            out[w] += q[i] * scale * k[i, w]


@_inner
def _scale_bits(exponent):
    """Those of 2^(exponent - 6), or of NaN for what is not finite."""
    return _NAN if exponent == _NOT_FINITE else (int32(exponent) + int32(121)) << 23


@_inner
def _scales(exponents, out):
    """out = 2^(exponent - 6), NaN for what is not finite."""
    bits = out.view(np.int32)
    for i in range(out.shape[0]):
        bits[i] = _scale_bits(exponents[i])


@_inner
def _round(x, codes, exponents, scale):
    """x in eight bits: codes and the exponents of its blocks; scale is room for one number."""
    bits = scale.view(np.int32)
    for n in range(exponents.shape[0]):
        first, end = n * BLOCK, min(x.shape[0], (n + 1) * BLOCK)
        most, finite = float32(0.0), True
        for i in range(first, end):
            most = max(most, abs(x[i]))
            finite = finite and abs(x[i]) < _INFINITY  # which no NaN is
        scale[0] = most
        exponent = max((bits[0] >> 23) - int32(127), int32(_LEAST_EXPONENT))
        exponents[n] = int8(exponent) if finite else int8(_NOT_FINITE)
        bits[0] = (int32(127 + 6) - exponent) << 23
        for i in range(first, end):
            code = np.rint(x[i] * scale[0]) if finite else float32(0.0)
            codes[i] = min(max(code, -_MOST), _MOST)


@_inner
def _times_codes(q, k, exponents, scale, part, scales, out):
    """As `_times`, of keys in eight bits; part and scales are room for as many numbers as out has."""
    for w in range(out.shape[0]):
        out[w] = float32(0.0)
    for n in range(exponents.shape[0]):
        end = min(q.shape[0], (n + 1) * BLOCK)
        for w in range(out.shape[0]):
            part[w] = float32(0.0)
        for i in range(n * BLOCK, end - 3, 4):
            q0, q1, q2, q3 = q[i] * scale, q[i + 1] * scale, q[i + 2] * scale, q[i + 3] * scale
            for w in range(out.shape[0]):
                near = q0 * float32(k[i, w]) + q1 * float32(k[i + 1, w])
                part[w] += near + q2 * float32(k[i + 2, w]) + q3 * float32(k[i + 3, w])
        for i in range(end - end % 4, end):
            for w in range(out.shape[0]):
                part[w] += q[i] * scale * float32(k[i, w])
        _scales(exponents[n], scales)
        for w in range(out.shape[0]):
            out[w] += part[w] * scales[w]


@_inner
def _add_weighted_codes(v, exponents, weights, scaled, out):
    """As `_add_weighted`, of values in eight bits; scaled is room for as many numbers as there are weights."""
    wide = v.shape[1]
    codes, result = codes_at(v.ctypes.data), pointer(out.ctypes.data)
    for n in range(exponents.shape[0]):
        first, end = n * BLOCK, min(wide, (n + 1) * BLOCK)
        _scales(exponents[n], scaled)
        for w in range(weights.shape[0]):
            scaled[w] *= weights[w]
        for j in range(first, end - 2 * LANES + 1, 2 * LANES):
            _add_rows_of_codes(codes, wide, scaled, j, result)
        for j in range(end - (end - first) % (2 * LANES), end):
            for w in range(weights.shape[0]):
                out[j] += scaled[w] * float32(v[w, j])


@_inner
def _put(exponents, places, place):
    """Those of one token where those of all are."""
    for n in range(exponents.shape[0]):
        places[n, place] = exponents[n]


@_inner
def _numbers(codes, exponents, place, scale, out):
    """out = what the codes of one token stand for; scale is room for one number."""
    for n in range(exponents.shape[0]):
        _scales(exponents[n, place:], scale)
        for i in range(n * BLOCK, min(out.shape[0], (n + 1) * BLOCK)):
            out[i] = float32(codes[i]) * scale[0]


@_inner
def _load_state(codes, exponents, scale, out):
    """out = what the codes of a state stand for; scale is room for one number."""
    bits = scale.view(np.int32)
    wide, result, whole = out.shape[1], pointer(out.ctypes.data), codes_at(codes.ctypes.data)
    for i in range(out.shape[0]):
        for n in range(exponents.shape[1]):
            first, end = n * BLOCK, min(wide, (n + 1) * BLOCK)
            bits[0] = _scale_bits(exponents[i, n])
            if end - first == BLOCK:
                load_scaled(result, whole, i * wide + first, bits[0])
            else:
                for j in range(first, end):
                    out[i, j] = float32(codes[i, j]) * scale[0]


@_inner
def _round_state(state, token, codes, exponents, scale):
    """The state after this token in eight bits, dithered; scale is room for one number."""
    bits = scale.view(np.int32)
    wide, numbers, whole = state.shape[1], pointer(state.ctypes.data), codes_at(codes.ctypes.data)
    for i in range(state.shape[0]):
        row = i * _OF_ROW + token * _OF_TOKEN
        for n in range(exponents.shape[1]):
            first, end = n * BLOCK, min(wide, (n + 1) * BLOCK)
            most = 0
            if end - first == BLOCK:
                most = largest_bits(numbers, i * wide + first)
            else:
                for j in range(first, end):
                    scale[0] = abs(state[i, j])
                    most = max(most, bits[0])
            exponent = (most >> 23) - 127 + (1 if (most & 0x7FFFFF) > _MOST_MANTISSA else 0)
            exponent = min(max(exponent, _LEAST_EXPONENT), 127)
            exponents[i, n] = exponent if most < _INFINITE else _NOT_FINITE
            # What is not finite is rounded to nobody's codes.
            bits[0] = (127 + 6 - exponent) << 23 if most < _INFINITE else 0
            place = row + first * _OF_COLUMN
            if end - first == BLOCK:
                store_dithered(whole, numbers, i * wide + first, bits[0], place, _OF_COLUMN)
            else:
                for j in range(first, end):
                    pattern = float32((place & 0xFFFFFFFF) >> 16) * float32(2.0**-16)
                    code = math.floor(abs(state[i, j]) * scale[0] + pattern) if most < _INFINITE else float32(0.0)
                    code = min(code, _MOST)
                    codes[i, j] = -code if state[i, j] < float32(0.0) else code
                    place += _OF_COLUMN


@_kernel("void(f4[:,::1], f4[:,::1], f4[::1], f4[::1], f4, f4, f4[:,::1])")
def add_and_normalise(x, more, weight, bias, epsilon, offset, out):
    """x += more; out = x / rms(x) * (offset + weight), for each row; out may be x.

    With a bias x is centred first, and that is added.
    """
    for b in range(x.shape[0]):
        mean = total = float32(0.0)
        for i in range(x.shape[1]):
            value = x[b, i] + more[b, i]
            x[b, i] = value
            mean += value
        if bias.shape[0] > 0:
            mean /= float32(x.shape[1])
        else:
            mean = float32(0.0)
        for i in range(x.shape[1]):
            total += (x[b, i] - mean) * (x[b, i] - mean)
        factor = float32(1.0) / math.sqrt(total / float32(x.shape[1]) + epsilon)
        for i in range(x.shape[1]):
            out[b, i] = (x[b, i] - mean) * factor * (offset + weight[i])
        for i in range(bias.shape[0]):
            out[b, i] += bias[i]


@_kernel("void(f4[:,::1], f4[:,::1], f4[:,::1])")
def gated_unit(gate, up, out):
    """out = silu(gate) * up"""
    for b in range(gate.shape[0]):
        for i in range(gate.shape[1]):
            out[b, i] = -abs(gate[b, i])
        _exponentials(out[b])
        for i in range(gate.shape[1]):
            small = out[b, i]  # exp(-|g|), which cannot overflow
            share = float32(1.0) if gate[b, i] >= 0 else small
            out[b, i] = gate[b, i] * share / (float32(1.0) + small) * up[b, i]


@_inner
def _gelu(x, out):
    """out = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): gelu by its tanh."""
    for i in range(x.shape[0]):
        out[i] = -abs(_GELU * (x[i] + float32(0.044715) * x[i] * x[i] * x[i]))
    _exponentials(out)
    for i in range(x.shape[0]):
        small = out[i]  # exp(-2|u|), which cannot overflow
        share = float32(1.0) if x[i] >= 0 else small
        out[i] = x[i] * share / (float32(1.0) + small)


@_kernel("void(f4[:,::1], f4[:,::1])")
def gelu_unit(x, out):
    """out = gelu(x), by its tanh"""
    for b in range(x.shape[0]):
        _gelu(x[b], out[b])


@_kernel("void(f4[:,::1], f4[:,::1], f4[:,::1])")
def gated_gelu_unit(gate, up, out):
    """out = gelu(gate) * up, by its tanh"""
    for b in range(gate.shape[0]):
        _gelu(gate[b], out[b])
        for i in range(gate.shape[1]):
            out[b, i] *= up[b, i]


@_kernel("void(f4[:,::1], f4[:,::1])")
def exact_gelu_unit(x, out):
    """out = x Phi(x): gelu by the error function, which is within 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[b, i] = float32(-0.5) * x[b, i] * x[b, i]
        _exponentials(out[b])
        for i in range(x.shape[1]):
            t = float32(1.0) / (float32(1.0) + _ERF_T * abs(x[b, i]))
            p = _ERF[0]
            p = p * t + _ERF[1]
            p = p * t + _ERF[2]
            p = p * t + _ERF[3]
            p = p * t + _ERF[4]
            beyond = float32(0.5) * p * t * out[b, i]  # of a normal number's probability, on the side of x
            share = float32(1.0) - beyond if x[b, i] >= 0 else beyond
            out[b, i] = x[b, i] * share


@_kernel("void(f4[:,::1], f4[:,::1])")
def relu_unit(x, out):
    """out = max(x, 0); NaN stays what it is."""
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[b, i] = float32(0.0) if x[b, i] < 0 else x[b, i]


ARRAYS = [
    "q",
    "k",
    "v",
    "x",
    "rotary",
    "sink_rotary",
    "leaving_rotary",
    "q_norm",
    "k_norm",
    "taps",
    "tails",
    "key_logits",
    "key_down",
    "key_up",
    "key_bias",
    "value_logits",
    "value_down",
    "value_up",
    "value_bias",
    "query_map",
    "key_map",
    "value_map",
    "fast",
    "ring_k",
    "ring_v",
    "sink_k",
    "sink_v",
    "fast_scale",
    "fast_unit",
    "window_scale",
    "window_bias",
    "numbers",
    "out",
    "mean_logits",
    "mean_down",
    "mean_up",
    "mean_bias",
    "mean_query_map",
    "mean_key_map",
    "share",
    "mix_weight",
    "mix_bias",
    "mix_share",
    "k_codes",
    "v_codes",
    "k_exponents",
    "v_exponents",
    "fast_codes",
    "fast_exponents",
]
"""That `attend` reads and writes, in the order of its record; the last six are of int8, all others of float32."""
FLAGS = "rotated_fast", "leaving", "averages", "normed", "delta"
_AT = 2 + len(FLAGS)
"""Place in the record of the first array's address and shape."""


@_inner
def _line(record, i):
    at = _AT + 5 * i
    return carray(pointer(integer_at(record, at)), (integer_at(record, at + 1),))


@_inner
def _plane(record, i):
    at = _AT + 5 * i
    return carray(pointer(integer_at(record, at)), (integer_at(record, at + 1), integer_at(record, at + 2)))


@_inner
def _block(record, i):
    at = _AT + 5 * i
    shape = integer_at(record, at + 1), integer_at(record, at + 2), integer_at(record, at + 3)
    return carray(pointer(integer_at(record, at)), shape)


@_inner
def _four(record, i):
    at = _AT + 5 * i
    return (
        integer_at(record, at + 1),
        integer_at(record, at + 2),
        integer_at(record, at + 3),
        integer_at(record, at + 4),
    )


@_inner
def _blocks(record, i):
    return carray(pointer(integer_at(record, _AT + 5 * i)), _four(record, i))


@_inner
def _blocks_of_codes(record, i):
    return carray(codes_at(integer_at(record, _AT + 5 * i)), _four(record, i))


def record_of(arrays: list[Any], flags: dict[str, bool]) -> array:
    """What `attend` is given: portions taken, tokens before this one, FLAGS, and address and shape of each of ARRAYS.

    Args:
        arrays: in their order and of their types, contiguous; the record keeps none of them alive.
        flags: by name.
    """
    assert len(arrays) == len(ARRAYS)
    places = ((x.ctypes.data, *x.shape, *(4 - x.ndim) * (0,)) for x in arrays)
    return array("q", [0, 0, *(int(flags[name]) for name in FLAGS), *(number for place in places for number in place)])


def _compile(version: int) -> Any:
    # Numba's cache looks at this file alone; `version` is part of its key.
    @cfunc("void(int64)", cache=True)
    def attend(record):
        """Fast weights and window of one layer for one token, which become part of the state; out is their sum.

        Threads take one row's key/value head after another, until none is left.

        x: (B, d) the layer's input, of which gates of low rank are made: `up` times `down` times x, and a bias.
        key_logits, value_logits: (B, _) what other gates are made of, bias included.
        rotary, sink_rotary, leaving_rotary: (2, width) cosines and sines of the token, of queries for sinks, and of
            what takes the embedding off the key that leaves the window; of width 0 for none.
        key_bias, value_bias: of width 0 without such a gate, of one number a head or of one a channel.
        taps, tails: (H + 2G, D, n) and (B, H + 2G, D, n - 1) the short convolution of all heads' queries, keys and
            values, in this order, and the tokens before; of width 0 for none.
        query_map, key_map, value_map: (H * D, D), (G * D, D), (G * V, V) the matrices of each head's queries, keys and
            values for the fast weights; of width 0 for none.
        mean_logits, mean_down, mean_up, mean_bias: of the gate, one a head, of a second state of (2F, V + 1), which is
            read as an average; it lies beneath that of the delta rule, whose last column is then not used.
        mean_query_map, mean_key_map: (H * F, D) and (G * F, D) its maps, of the fast weights' queries and keys.
        share: (H,) of that average in what is said; of width 0 without such a state.
        mix_weight, mix_bias: (H, d) and (H,) of the gate on the mix, of width 0 without one.
        mix_share: (H,) of this gate, by which a window counts less.
        k_codes, v_codes, k_exponents, v_exponents: (B, G, D, W), (B, G, W, V), and (B, G, _, W) both, a window in eight
            bits, in the place of ring_k and ring_v; else of width 0.
        fast_codes, fast_exponents: (B, G, _, _) both, a state in eight bits, in the place of fast; else of width 0.
        window_bias: (H, W + S) added to the logits of each distance, then of each sink; of width 0 for none.
        numbers: the norms' epsilon, what they add to their weights, and the factor of q·k.
        rotated_fast: whether the fast weights' queries and keys have the rotary embedding.
        leaving: whether they are written what leaves the window, and read before that.
        averages: whether they are written under k * (1 - gate).
        normed: whether queries and keys are normalised.
        delta: whether they are written by the delta rule; what are the value gate's here are its strength's, then.
        """
        _ = version
        _attend(record)

    return attend


@_inner
def _attend(record):
    count = integer_at(record, 1)
    rotated_fast, leaving = integer_at(record, 2) > 0, integer_at(record, 3) > 0
    averages, normed, delta = integer_at(record, 4) > 0, integer_at(record, 5) > 0, integer_at(record, 6) > 0
    q, k, v = _block(record, 0), _block(record, 1), _block(record, 2)
    x, rotary = _plane(record, 3), _plane(record, 4)
    sink_rotary, leaving_rotary = _plane(record, 5), _plane(record, 6)
    q_norm, k_norm = _line(record, 7), _line(record, 8)
    taps, tails = _block(record, 9), _blocks(record, 10)
    key_logits, key_down = _plane(record, 11), _plane(record, 12)
    key_up, key_bias = _plane(record, 13), _line(record, 14)
    value_logits, value_down = _plane(record, 15), _plane(record, 16)
    value_up, value_bias = _plane(record, 17), _line(record, 18)
    query_map, key_map, value_map = _plane(record, 19), _plane(record, 20), _plane(record, 21)
    fast, ring_k = _blocks(record, 22), _blocks(record, 23)
    ring_v, sink_k, sink_v = _blocks(record, 24), _blocks(record, 25), _blocks(record, 26)
    fast_scale, fast_unit, window_scale = _line(record, 27), _line(record, 28), _line(record, 29)
    window_bias, numbers, out = _plane(record, 30), _line(record, 31), _block(record, 32)
    mean_logits, mean_down, mean_up = _plane(record, 33), _plane(record, 34), _plane(record, 35)
    mean_bias, mean_query_map, mean_key_map = _line(record, 36), _plane(record, 37), _plane(record, 38)
    share = _line(record, 39)
    mix_weight, mix_bias, mix_share = _plane(record, 40), _line(record, 41), _line(record, 42)
    k_codes, v_codes = _blocks_of_codes(record, 43), _blocks_of_codes(record, 44)
    k_exponents, v_exponents = _blocks_of_codes(record, 45), _blocks_of_codes(record, 46)
    fast_codes, fast_exponents = _blocks_of_codes(record, 47), _blocks_of_codes(record, 48)
    has_mean, in_bits, state_in_bits = share.shape[0] > 0, k_codes.shape[3] > 0, fast_codes.shape[3] > 0
    epsilon, offset, scale = numbers[0], numbers[1], numbers[2]
    B, H, D = q.shape
    G, V = v.shape[1], v.shape[2]
    R, W, S = H // G, max(ring_k.shape[3], k_codes.shape[3]), sink_k.shape[2]
    seen = min(W, count + 1)
    far = min(S, max(0, count - W + 1))
    place = count % W if W > 0 else 0
    weights = np.empty((R, far + seen), dtype=np.float32)
    rotated_q, sink_q = np.empty((R, D), dtype=np.float32), np.empty((R, D), dtype=np.float32)
    fast_q = np.empty((R, D), dtype=np.float32)
    of_fast, of_window = np.empty(H, dtype=np.float32), np.ones(H, dtype=np.float32)
    rotated_k, written = np.empty(D, dtype=np.float32), np.empty(D, dtype=np.float32)
    key, value = np.empty(D, dtype=np.float32), np.empty(V, dtype=np.float32)
    mapped = np.empty(V, dtype=np.float32)
    read, zero = np.empty(V, dtype=np.float32), float32(0.0)
    f = np.ones(max(1, key_bias.shape[0] // G), dtype=np.float32)
    f_rest = np.zeros(f.shape[0], dtype=np.float32)
    z = np.ones(max(1, value_bias.shape[0] // G), dtype=np.float32)
    z_rest = np.empty(z.shape[0], dtype=np.float32)
    features = max(fast.shape[2], fast_codes.shape[2]) - D if has_mean else 0
    numbers_of_state = np.empty((fast_codes.shape[2], fast_codes.shape[3]), dtype=np.float32)
    mean_f, mean_rest = np.empty(1, dtype=np.float32), np.empty(1, dtype=np.float32)
    mean_q, mean_k = np.empty((R, features), dtype=np.float32), np.empty(features, dtype=np.float32)
    mean_v, mean = np.ones(V + 1, dtype=np.float32), np.empty(V + 1, dtype=np.float32)
    one = np.ones(1, dtype=np.float32)
    mean_low = np.empty(mean_down.shape[0], dtype=np.float32)
    key_low = np.empty(key_down.shape[0], dtype=np.float32)
    value_low = np.empty(value_down.shape[0], dtype=np.float32)
    new_codes = np.empty(D if in_bits else 0, dtype=np.int8)
    new_exponents = np.empty(max(k_exponents.shape[2], v_exponents.shape[2]), dtype=np.int8)
    number = np.empty(1, dtype=np.float32)
    room = seen if in_bits else 0
    part, key_scales = np.empty(room, dtype=np.float32), np.empty(room, dtype=np.float32)
    row = -1
    while True:
        unit = take(record)
        if unit >= B * G:
            break
        b, g = unit // G, unit % G
        if b != row:
            row = b
            for i in range(key_low.shape[0]):
                key_low[i] = _dot(key_down[i], x[b])
            for i in range(value_low.shape[0]):
                value_low[i] = _dot(value_down[i], x[b])
            for i in range(mean_low.shape[0]):
                mean_low[i] = _dot(mean_down[i], x[b])
        if normed:
            _normalise(k[b, g], k_norm, epsilon, offset)
        if taps.shape[2] > 0:
            _convolve(k[b, g], taps[H + g], tails[b, H + g])
            _convolve(v[b, g], taps[H + G + g], tails[b, H + G + g])
        _rotate(k[b, g], rotary[0], rotary[1], rotated_k)
        for r in range(R):
            if normed:
                _normalise(q[b, g * R + r], q_norm, epsilon, offset)
            if taps.shape[2] > 0:
                _convolve(q[b, g * R + r], taps[g * R + r], tails[b, g * R + r])
            _rotate(q[b, g * R + r], rotary[0], rotary[1], rotated_q[r])
            _map(query_map, g * R + r, rotated_q[r] if rotated_fast else q[b, g * R + r], fast_q[r])
            if has_mean:
                _softmaxes(mean_query_map, g * R + r, fast_q[r], mean_q[r])
            h = g * R + r
            of_fast[h] = fast_scale[h]
            if mix_bias.shape[0] > 0:
                often = float32(2.0) / (float32(1.0) + math.exp(-(_dot(mix_weight[h], x[b]) + mix_bias[h])))
                of_fast[h] *= often
                if mix_share.shape[0] > 0:
                    of_window[h] = float32(1.0) - mix_share[h] * often
            for j in range(V):
                out[b, h, j] = zero
        if in_bits:
            _round(rotated_k, new_codes, new_exponents[: k_exponents.shape[2]], number)
            for i in range(D):
                k_codes[b, g, i, place] = new_codes[i]
            _put(new_exponents[: k_exponents.shape[2]], k_exponents[b, g], place)
            _round(v[b, g], v_codes[b, g, place], new_exponents[: v_exponents.shape[2]], number)
            _put(new_exponents[: v_exponents.shape[2]], v_exponents[b, g], place)
        elif W > 0:
            for i in range(D):
                ring_k[b, g, i, place] = rotated_k[i]
            for j in range(V):
                ring_v[b, g, place, j] = v[b, g, j]
        if W > 0:
            if count < S:
                for i in range(D):
                    sink_k[b, g, count, i] = rotated_k[i]
                for j in range(V):
                    sink_v[b, g, count, j] = v[b, g, j]
            for r in range(R):
                h = g * R + r
                if far > 0:
                    _rotate(q[b, h], sink_rotary[0], sink_rotary[1], sink_q[r])
                    for s in range(far):
                        weights[r, s] = _dot(sink_q[r], sink_k[b, g, s]) * scale
                if in_bits:
                    _times_codes(
                        rotated_q[r], k_codes[b, g], k_exponents[b, g], scale, part, key_scales, weights[r, far:]
                    )
                else:
                    _times(rotated_q[r], ring_k[b, g], scale, weights[r, far:])
                if window_bias.shape[1] > 0:
                    for s in range(far):
                        weights[r, s] += window_bias[h, W + s]
                    for w in range(seen):
                        weights[r, far + w] += window_bias[h, place - w if w <= place else place - w + W]
                most = weights[r, 0]
                for w in range(1, far + seen):
                    most = max(most, weights[r, w])
                for w in range(far + seen):
                    weights[r, w] -= most
                _exponentials(weights[r])
                total = zero
                for w in range(far + seen):
                    total += weights[r, w]
                factor = window_scale[h] * of_window[h] / total
                for w in range(far + seen):
                    weights[r, w] *= factor
                _add_weighted(sink_v[b, g], weights[r, :far], out[b, h])
                if in_bits:
                    _add_weighted_codes(v_codes[b, g], v_exponents[b, g], weights[r, far:], part, out[b, h])
                else:
                    _add_weighted(ring_v[b, g], weights[r, far:], out[b, h])
        if state_in_bits:
            held = numbers_of_state
            _load_state(fast_codes[b, g], fast_exponents[b, g], number, held)
        else:
            held = fast[b, g]
        state, averaged = held[:D], held[D:]
        left = (place + 1) % W if leaving else 0
        if leaving:
            _read(state, fast_q, g * R, of_fast, fast_unit, scale, read, out[b])
            if has_mean:
                _read_mean(averaged, mean_q, g * R, share, of_fast, fast_unit, mean, out[b])
        if not leaving or count >= W - 1 + S:
            if key_bias.shape[0] > 0:
                _gate(key_logits[b], key_up, key_low, key_bias, g * f.shape[0], f, f_rest)
            if value_bias.shape[0] > 0:
                _gate(value_logits[b], value_up, value_low, value_bias, g * z.shape[0], z, z_rest)
            for j in range(V):
                value[j] = v[b, g, j]
            if leaving and in_bits:
                for i in range(D):
                    new_codes[i] = k_codes[b, g, i, left]
                _numbers(new_codes, k_exponents[b, g], left, number, rotated_k)
                _numbers(v_codes[b, g, left], v_exponents[b, g], left, number, value)
            elif leaving:
                for i in range(D):
                    rotated_k[i] = ring_k[b, g, i, left]
                for j in range(V):
                    value[j] = ring_v[b, g, left, j]
            if leaving:
                _rotate(rotated_k, leaving_rotary[0], leaving_rotary[1], key)
            else:
                for i in range(D):
                    key[i] = rotated_k[i] if rotated_fast else k[b, g, i]
            _map(key_map, g, key, written)
            if averages:
                for i in range(D):
                    written[i] *= f_rest[i if f.shape[0] > 1 else 0]
            _map(value_map, g, value, mapped)
            if has_mean:
                _gate(mean_logits[b], mean_up, mean_low, mean_bias, g, mean_f, mean_rest)
                _softmaxes(mean_key_map, g, written, mean_k)
                for j in range(V):
                    mean_v[j] = mapped[j]
                _write(averaged, mean_f, one, mean_k, mean_v)
            if delta:
                _write_by_delta(state, f[0], z[0], written, mapped, read)
            else:
                _write(state, f, z, written, mapped)
            if state_in_bits:
                _round_state(held, count, fast_codes[b, g], fast_exponents[b, g], number)
        if not leaving:
            _read(state, fast_q, g * R, of_fast, fast_unit, scale, read, out[b])
            if has_mean:
                _read_mean(averaged, mean_q, g * R, share, of_fast, fast_unit, mean, out[b])


attend = _compile(sources_version(Path(__file__).parent))
