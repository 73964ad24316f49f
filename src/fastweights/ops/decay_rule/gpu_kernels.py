"""The decay rule on GPUs: Triton kernels, parallel over chunks of tokens, heads and tiles of the state.

Notation
    m        chunk: CHUNK = 2^LEVELS tokens of one sequence, whose last one may have fewer; its chunks are neighbours
    S        a tile of the state (K, V) of one key/value head; tiles make up for few heads, and for wide states
    f, z     key-side and value-side gates, in [0, 1]; log_f, log_z their logs
    "before" product of the gates from the chunk's start to a token, and its own
    "after"  product of the gates after a token, to the chunk's end
    A        (tokens, heads, CHUNK), what token t reads of each token j of its chunk, q_t . (gates in between) k_j; B
             likewise of do and v
    level    of two tokens of a chunk: the highest bit in which their places differ. The later one lies in the right
             half, and the earlier one in the left half, of a block of 2^(level + 1) tokens

The gates between two tokens of a level are those from the earlier one to the middle of the block, times those from
there to the later one: so all pairs of a level are one product of matrices, of which each row has decayed towards, or
from, the middle of its block. Each of these products of gates is e to the sum of the logs of exactly these steps: never
above 1, never a quotient, never a difference of two running sums, which would cancel; so a log gate may be -inf. Every
sum of the gradients of gates is one over paths through a token, of which nothing is subtracted, either.

The recurrence is its own mirror image: with q and do, k and v, f and z, and the sides of the state exchanged, the
gradients of keys are those of values. So kernels speak of a near side, whose columns a program works out, and of the
far side, over all of which it sums; `r` is what reads on a side (q or do), `w` what is written (k or v).

Tokens are rows of (tokens, heads, width). SHIFT is 1 where tokens read before their own write: token t + 1 then reads
where token t would. PRECISION says how tensor cores multiply float32 numbers: "tf32" or "tf32x3".
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot_of_bfloat16(a, b, total):
    """a b + total, whose factors are bfloat16."""
    if _INTERPRETED:  # which takes their bits for whole numbers
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _sums(which, x, PRECISION: tl.constexpr):
    """Of those rows of x for which `which` is true: x is cut into parts of 8 bits, which bfloat16 leaves whole.

    Two parts are more than products of "tf32" keep; three are all of float32.
    """
    ones = which.to(tl.float32).to(tl.bfloat16)
    part = x.to(tl.bfloat16)
    rest = x - part.to(tl.float32)
    total = _dot_of_bfloat16(ones, part, tl.zeros((which.shape[0], x.shape[1]), tl.float32))
    part = rest.to(tl.bfloat16)
    total = _dot_of_bfloat16(ones, part, total)
    if PRECISION == "tf32x3":
        rest = rest - part.to(tl.float32)
        total = _dot_of_bfloat16(ones, rest.to(tl.bfloat16), total)
    return total


@triton.jit
def _is_right(place, level):
    """Whether a place lies in the right half of its block."""
    return ((place >> level) & 1) == 1


@triton.jit
def _steps(t, s, level):
    """Whether the gate of s lies between t and the middle of its block; t's own does for a t on the right."""
    right = _is_right(t, level)
    return ((t >> level) == (s >> level)) & ((right & (s <= t)) | (~right & (s > t)))


@triton.jit
def _of_level(t, j, level):
    """Whether t in a right half reads j in the left half of the same block."""
    return ((t >> level) == (j >> level) + 1) & _is_right(t, level)


@triton.jit
def _rows(x, rows, there, columns, width, stride, column_stride):
    """Rows of one head as (rows, columns) of float32, 0 where there is none."""
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :] * column_stride
    return tl.load(at, mask=there[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _logs(log_gate, rows, there, columns, width, stride, column_stride):
    """Logs of a gate; one of -inf is finite, and far below what a number may be e to, so that 0 times it is 0."""
    logs = _rows(log_gate, rows, there, columns, width, stride, column_stride)
    return tl.where(logs < -1e30, -1e30, logs)


@triton.jit
def _store_rows(x, rows, there, columns, width, stride, tile):
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if _INTERPRETED and x.dtype.element_ty == tl.bfloat16:  # which cuts off where a GPU rounds to the nearest
        bits = tile.to(tl.uint32, bitcast=True)
        tile = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    tl.store(at, tile, mask=there[:, None] & (columns < width)[None, :])


@triton.jit
def _load_tile(S, row, keys, values, K, V):
    """A tile of a contiguous (rows, K, V), 0 beyond it."""
    at = S + row.to(tl.int64) * K * V + keys[:, None] * V + values[None, :]
    return tl.load(at, mask=(keys < K)[:, None] & (values < V)[None, :], other=0.0)


@triton.jit
def _store_tile(S, row, keys, values, K, V, tile):
    at = S + row.to(tl.int64) * K * V + keys[:, None] * V + values[None, :]
    tl.store(at, tile, mask=(keys < K)[:, None] & (values < V)[None, :])


@triton.jit
def _load_sides(S, row, far, near, FAR, NEAR, NEAR_IS_KEY: tl.constexpr):
    """A tile (far, near) of a contiguous (rows, K, V), 0 beyond it."""
    if NEAR_IS_KEY:
        at = S + row.to(tl.int64) * FAR * NEAR + near[None, :] * FAR + far[:, None]
        tile = tl.load(at, mask=(far < FAR)[:, None] & (near < NEAR)[None, :], other=0.0)
    else:
        tile = _load_tile(S, row, far, near, FAR, NEAR)
    return tile


@triton.jit
def written(
    k, v, log_f, log_z, starts, ends, U, F, Z,
    k_row, k_head, k_column, v_row, v_head, v_column, f_row, f_head, f_column, z_row, z_head, z_column,
    G, K, V,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U: what a chunk's tokens have written by its end, from a state of 0; F, Z: what it leaves of the state before."""
    m, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(V, BF)
    key_tile, value_tile = tile // tiles, tile % tiles
    keys, values = key_tile * BN + tl.arange(0, BN), value_tile * BF + tl.arange(0, BF)
    start, end = tl.load(starts + m), tl.load(ends + m)
    place = tl.arange(0, CHUNK)
    rows = start + place
    later = place[None, :] > place[:, None]
    k, v, log_f, log_z = k + g * k_head, v + g * v_head, log_f + g * f_head, log_z + g * z_head
    head = (m * G + g).to(tl.int64)
    keys_left = _rows(k, rows, rows < end, keys, K, k_row, k_column)
    f_whole, z_whole = tl.full((BN,), 1.0, tl.float32), tl.full((BF,), 1.0, tl.float32)
    if KEY_GATE:
        logs = _logs(log_f, rows, rows < end, keys, K, f_row, f_column)
        keys_left *= tl.exp(_sums(later, logs, PRECISION))
        f_whole = tl.exp(tl.sum(logs, 0))
    values_left = _rows(v, rows, rows < end, values, V, v_row, v_column)
    if VALUE_GATE:
        logs = _logs(log_z, rows, rows < end, values, V, z_row, z_column)
        values_left *= tl.exp(_sums(later, logs, PRECISION))
        z_whole = tl.exp(tl.sum(logs, 0))
    _store_tile(U, head, keys, values, K, V, tl.dot(tl.trans(keys_left), values_left, input_precision=PRECISION))
    if value_tile == 0:
        tl.store(F + head * K + keys, f_whole, mask=keys < K)
    if key_tile == 0:
        tl.store(Z + head * V + values, z_whole, mask=values < V)


@triton.jit
def read_back(
    q, do, log_f, log_z, starts, ends, sequence_starts, dU,
    q_row, q_head, q_column, do_row, do_head, do_column, f_row, f_head, f_column, z_row, z_head, z_column,
    G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU: the gradient of the state before a chunk, from what the chunk's tokens read."""
    m, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(V, BF)
    keys, values = (tile // tiles) * BN + tl.arange(0, BN), (tile % tiles) * BF + tl.arange(0, BF)
    start, end = tl.load(starts + m), tl.load(ends + m)
    log_f, log_z = log_f + g * f_head, log_z + g * z_head
    place = tl.arange(0, CHUNK)
    rows = start + place
    readers = rows + SHIFT
    to_here = place[None, :] <= place[:, None]
    f_before, z_before = tl.full((CHUNK, BN), 1.0, tl.float32), tl.full((CHUNK, BF), 1.0, tl.float32)
    if KEY_GATE:
        f_before = tl.exp(_sums(to_here, _logs(log_f, rows, rows < end, keys, K, f_row, f_column), PRECISION))
    if VALUE_GATE:
        z_before = tl.exp(_sums(to_here, _logs(log_z, rows, rows < end, values, V, z_row, z_column), PRECISION))
    total = tl.zeros((BN, BF), tl.float32)
    for i in range(R):
        h = g * R + i
        queries = _rows(q + h * q_head, readers, readers < end, keys, K, q_row, q_column) * scale
        given = _rows(do + h * do_head, readers, readers < end, values, V, do_row, do_column)
        total += tl.dot(tl.trans(queries * f_before), given * z_before, input_precision=PRECISION)
        if SHIFT:  # the first token of a sequence reads the state before it
            if start == tl.load(sequence_starts + m):
                first = (place == 0) & (rows < end)
                queries = _rows(q + h * q_head, rows, first, keys, K, q_row, q_column) * scale
                given = _rows(do + h * do_head, rows, first, values, V, do_row, do_column)
                total += tl.dot(tl.trans(queries), given, input_precision=PRECISION)
    _store_tile(dU, m * G + g, keys, values, K, V, total)


@triton.jit
def scan(
    states, F, Z, first_chunks, chunk_counts, before, after,
    G, K, V, BACK: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to the state before each, in place; or BACK, from each chunk's dU to dS after each.

    before, after: (N, G, K, V), the state before a sequence's first chunk and after its last; BACK reads the latter's
    gradient, and writes the former's.
    """
    n, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(V, BF)
    keys, values = (tile // tiles) * BN + tl.arange(0, BN), (tile % tiles) * BF + tl.arange(0, BF)
    first, count = tl.load(first_chunks + n), tl.load(chunk_counts + n)
    if BACK:
        S = _load_tile(after, n * G + g, keys, values, K, V)
    else:
        S = _load_tile(before, n * G + g, keys, values, K, V)
    for i in range(count):
        m = first + i
        if BACK:
            m = first + count - 1 - i
        head = m * G + g
        added = _load_tile(states, head, keys, values, K, V)
        f = tl.load(F + head.to(tl.int64) * K + keys, mask=keys < K, other=0.0)
        z = tl.load(Z + head.to(tl.int64) * V + values, mask=values < V, other=0.0)
        _store_tile(states, head, keys, values, K, V, S)
        S = f[:, None] * z[None, :] * S + added
    if BACK:
        _store_tile(before, n * G + g, keys, values, K, V, S)
    else:
        _store_tile(after, n * G + g, keys, values, K, V, S)


@triton.jit
def pairs(
    r, w, log_gate, starts, ends, A,
    r_row, r_head, r_column, w_row, w_head, w_column, gate_row, gate_head, gate_column,
    H, R, D, scale,
    GATED: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A[t, j] = scale * r_t . (gates in between) w_j, for tokens j of the chunk up to t; else 0."""
    m, h = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + m), tl.load(ends + m)
    g = h // R
    r, w, log_gate = r + h * r_head, w + g * w_head, log_gate + g * gate_head
    place = tl.arange(0, CHUNK)
    rows = start + place
    readers = rows + SHIFT
    total = tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, D, BN):
        columns = first + tl.arange(0, BN)
        reading = _rows(r, readers, readers < end, columns, D, r_row, r_column) * scale
        writing = _rows(w, rows, rows < end, columns, D, w_row, w_column)
        if GATED:
            logs = _logs(log_gate, rows, rows < end, columns, D, gate_row, gate_column)
            own = tl.sum(reading * writing, 1)
            total += tl.where(place[:, None] == place[None, :], own[:, None], 0.0)
            for level in range(LEVELS):
                gates = tl.exp(_sums(_steps(place[:, None], place[None, :], level), logs, PRECISION))
                product = tl.dot(reading * gates, tl.trans(writing * gates), input_precision=PRECISION)
                total += tl.where(_of_level(place[:, None], place[None, :], level), product, 0.0)
        else:
            product = tl.dot(reading, tl.trans(writing), input_precision=PRECISION)
            total += tl.where(place[:, None] >= place[None, :], product, 0.0)
    _store_rows(A + h * CHUNK, rows, rows < end, place, CHUNK, H * CHUNK, total)


@triton.jit
def _load_pairs(A, rows, there, place, h, H, CHUNK: tl.constexpr):
    return _rows(A + h * CHUNK, rows, there, place, CHUNK, H * CHUNK, 1)


@triton.jit
def _near_reads(pairs, writing, logs, place, GATED: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """What tokens read of others of their chunk: the sum over j of pairs[t, j] (gates in between) writing[j]."""
    if GATED:
        own = tl.sum(tl.where(place[:, None] == place[None, :], pairs, 0.0), 1)
        total = own[:, None] * writing
        for level in range(LEVELS):
            gates = tl.exp(_sums(_steps(place[:, None], place[None, :], level), logs, PRECISION))
            total += gates * tl.dot(
                tl.where(_of_level(place[:, None], place[None, :], level), pairs, 0.0),
                writing * gates,
                input_precision=PRECISION,
            )
    else:
        total = tl.dot(pairs, writing, input_precision=PRECISION)
    return total


@triton.jit
def _far_reads(
    r, log_far, states, head, rows, readers, end, near, NEAR, FAR, r_row, r_column, far_row, far_column, scale,
    FAR_GATE: tl.constexpr, NEAR_IS_KEY: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What tokens read of the state before their chunk, before the near side's gates."""
    place = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK, BN), tl.float32)
    for first in range(0, FAR, BF):
        far = first + tl.arange(0, BF)
        reading = _rows(r, readers, readers < end, far, FAR, r_row, r_column) * scale
        if FAR_GATE:
            logs = _logs(log_far, rows, rows < end, far, FAR, far_row, far_column)
            reading *= tl.exp(_sums(place[None, :] <= place[:, None], logs, PRECISION))
        total += tl.dot(
            reading, _load_sides(states, head, far, near, FAR, NEAR, NEAR_IS_KEY), input_precision=PRECISION
        )
    return total


@triton.jit
def _first_reads(
    r, states, head, row, near, NEAR, FAR, r_row, r_column, scale,
    NEAR_IS_KEY: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """What the first token of a sequence reads of the state before it, where tokens read before their own write."""
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, FAR, BF):
        far = first + tl.arange(0, BF)
        reading = tl.load(r + row.to(tl.int64) * r_row + far * r_column, mask=far < FAR, other=0.0).to(tl.float32)
        S = _load_sides(states, head, far, near, FAR, NEAR, NEAR_IS_KEY)
        total += tl.sum(reading[:, None] * scale * S, 0)
    return total


@triton.jit
def outputs(
    q, v, log_f, log_z, A, states, starts, ends, sequence_starts, o,
    q_row, q_head, q_column, v_row, v_head, v_column, f_row, f_head, f_column, z_row, z_head, z_column,
    H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    BF: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (tokens, H, V): what each token reads."""
    m, h, value_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = h // R
    values = value_tile * BN + tl.arange(0, BN)
    start, end = tl.load(starts + m), tl.load(ends + m)
    q, v, log_f, log_z, o = q + h * q_head, v + g * v_head, log_f + g * f_head, log_z + g * z_head, o + h * V
    place, head = tl.arange(0, CHUNK), m * G + g
    rows = start + place
    readers = rows + SHIFT
    if SHIFT:
        if start == tl.load(sequence_starts + m):
            read = _first_reads(q, states, head, start, values, V, K, q_row, q_column, scale, False, BN, BF)
            tl.store(o + start.to(tl.int64) * H * V + values, read, mask=values < V)
    read = _far_reads(
        q, log_f, states, head, rows, readers, end, values, V, K, q_row, q_column, f_row, f_column, scale,
        KEY_GATE, False, CHUNK, BN, BF, PRECISION,
    )  # fmt: skip
    writing = _rows(v, rows, rows < end, values, V, v_row, v_column)
    logs = writing
    if VALUE_GATE:
        logs = _logs(log_z, rows, rows < end, values, V, z_row, z_column)
        read *= tl.exp(_sums(place[None, :] <= place[:, None], logs, PRECISION))
    near = _load_pairs(A, rows, rows < end, place, h, H, CHUNK)
    read += _near_reads(near, writing, logs, place, VALUE_GATE, LEVELS, PRECISION)
    _store_rows(o, readers, readers < end, values, V, H * V, read)


@triton.jit
def gradients(
    r, w, log_near, far_r, far_w, log_far, P, states, dstates, near_whole, far_whole,
    starts, ends, sequence_starts, dr, dw, dlog,
    r_row, r_head, r_column, w_row, w_head, w_column, near_row, near_head, near_column,
    far_r_row, far_r_head, far_r_column, far_w_row, far_w_head, far_w_column, far_row, far_head, far_column,
    H, G, R, NEAR, FAR, near_scale, far_scale,
    NEAR_GATE: tl.constexpr, FAR_GATE: tl.constexpr, NEAR_IS_KEY: tl.constexpr, SHIFT: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one side: dw, dlog, and if it is that of the keys dr; of the values' dr, o, there is no use.

    P: what tokens read of others of their chunk on the far side: B on the side of the keys, A on that of the values.
    """
    m, g = tl.program_id(0), tl.program_id(1)
    near = tl.program_id(2) * BN + tl.arange(0, BN)
    start, end = tl.load(starts + m), tl.load(ends + m)
    w, log_near, far_w, log_far = (
        w + g * w_head,
        log_near + g * near_head,
        far_w + g * far_w_head,
        log_far + g * far_head,
    )
    place, head = tl.arange(0, CHUNK), (m * G + g).to(tl.int64)
    rows = start + place
    readers = rows + SHIFT
    writing = _rows(w, rows, rows < end, near, NEAR, w_row, w_column)
    logs = writing
    if NEAR_GATE:
        logs = _logs(log_near, rows, rows < end, near, NEAR, near_row, near_column)

    # Paths from tokens of the chunk, and from the state before it, to the state after it.
    writing_grads = tl.zeros((CHUNK, BN), tl.float32)
    through = tl.zeros((BN,), tl.float32)
    for first in range(0, FAR, BF):
        far = first + tl.arange(0, BF)
        far_writing = _rows(far_w, rows, rows < end, far, FAR, far_w_row, far_w_column)
        if FAR_GATE:
            far_logs = _logs(log_far, rows, rows < end, far, FAR, far_row, far_column)
            far_writing *= tl.exp(_sums(place[None, :] > place[:, None], far_logs, PRECISION))
        dS = _load_sides(dstates, head, far, near, FAR, NEAR, NEAR_IS_KEY)
        writing_grads += tl.dot(far_writing, dS, input_precision=PRECISION)
        if NEAR_GATE:
            S = _load_sides(states, head, far, near, FAR, NEAR, NEAR_IS_KEY)
            left = tl.load(far_whole + head * FAR + far, mask=far < FAR, other=0.0)
            through += tl.sum(left[:, None] * dS * S, 0)
    gate_grads = tl.zeros((CHUNK, BN), tl.float32)
    before = gate_grads
    if NEAR_GATE:
        writing_grads *= tl.exp(_sums(place[None, :] > place[:, None], logs, PRECISION))
        through *= tl.load(near_whole + head * NEAR + near, mask=near < NEAR, other=0.0)
        gate_grads += _sums(place[None, :] < place[:, None], writing * writing_grads, PRECISION) + through[None, :]
        before = tl.exp(_sums(place[None, :] <= place[:, None], logs, PRECISION))

    for i in range(R):
        h = g * R + i
        reading = _rows(r + h * r_head, readers, readers < end, near, NEAR, r_row, r_column) * near_scale
        P_h = _load_pairs(P, rows, rows < end, place, h, H, CHUNK)
        if NEAR_GATE or NEAR_IS_KEY:
            # Paths from the state before the chunk to its tokens.
            reading_grads = _far_reads(
                far_r + h * far_r_head, log_far, states, head, rows, readers, end, near, NEAR, FAR,
                far_r_row, far_r_column, far_row, far_column, far_scale,
                FAR_GATE, NEAR_IS_KEY, CHUNK, BN, BF, PRECISION,
            )  # fmt: skip
            if NEAR_GATE:
                reading_grads *= before
                gate_grads += _sums(place[None, :] >= place[:, None], reading * reading_grads, PRECISION)
        # Paths inside the chunk.
        if NEAR_GATE:
            own = tl.sum(tl.where(place[:, None] == place[None, :], P_h, 0.0), 1)
            reading_grads += own[:, None] * writing
            writing_grads += own[:, None] * reading
            for level in range(LEVELS):
                gates = tl.exp(_sums(_steps(place[:, None], place[None, :], level), logs, PRECISION))
                of_level = tl.where(_of_level(place[:, None], place[None, :], level), P_h, 0.0)
                right = gates * tl.dot(of_level, writing * gates, input_precision=PRECISION)
                left = gates * tl.dot(tl.trans(of_level), reading * gates, input_precision=PRECISION)
                reading_grads += right
                writing_grads += left
                crossed = tl.where(_is_right(place, level)[:, None], reading * right, writing * left)
                gate_grads += _sums(_steps(place[None, :], place[:, None], level), crossed, PRECISION)
        else:
            if NEAR_IS_KEY:
                reading_grads += tl.dot(P_h, writing, input_precision=PRECISION)
            writing_grads += tl.dot(tl.trans(P_h), reading, input_precision=PRECISION)
        if NEAR_IS_KEY:
            _store_rows(dr + h * NEAR, readers, readers < end, near, NEAR, H * NEAR, reading_grads * near_scale)
            if SHIFT:
                if start == tl.load(sequence_starts + m):
                    first_grads = near_scale * _first_reads(
                        far_r + h * far_r_head, states, head, start, near, NEAR, FAR, far_r_row, far_r_column,
                        far_scale, NEAR_IS_KEY, BN, BF,
                    )  # fmt: skip
                    at = dr + (start.to(tl.int64) * H + h) * NEAR + near
                    tl.store(at, first_grads, mask=near < NEAR)

    _store_rows(dw + g * NEAR, rows, rows < end, near, NEAR, G * NEAR, writing_grads)
    if NEAR_GATE:
        _store_rows(dlog + g * NEAR, rows, rows < end, near, NEAR, G * NEAR, gate_grads)


@triton.jit
def step(
    q, k, v, log_f, log_z, before, o, after,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    f_row, f_head, f_column, z_row, z_head, z_column,
    H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, READERS: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One token of each sequence: decay, write and read, with the state read and written once."""
    n, g, value_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    values, readers = value_tile * BN + tl.arange(0, BN), tl.arange(0, READERS)
    row = n.to(tl.int64)
    value = tl.load(v + row * v_row + g * v_head + values * v_column, mask=values < V, other=0.0).to(tl.float32)
    z = tl.full((BN,), 1.0, tl.float32)
    if VALUE_GATE:
        z = tl.exp(
            tl.load(log_z + row * z_row + g * z_head + values * z_column, mask=values < V, other=0.0).to(tl.float32)
        )
    read = tl.zeros((READERS, BN), tl.float32)
    for first in range(0, K, BF):
        keys = first + tl.arange(0, BF)
        S = _load_tile(before, n * G + g, keys, values, K, V)
        heads = (g * R + readers)[:, None] * q_head
        asked = (readers < R)[:, None] & (keys < K)[None, :]
        queries = tl.load(q + row * q_row + heads + keys[None, :] * q_column, mask=asked, other=0.0).to(tl.float32)
        if SHIFT:
            read += tl.sum(queries[:, :, None] * S[None, :, :], 1)
        key = tl.load(k + row * k_row + g * k_head + keys * k_column, mask=keys < K, other=0.0).to(tl.float32)
        if KEY_GATE:
            f = tl.exp(
                tl.load(log_f + row * f_row + g * f_head + keys * f_column, mask=keys < K, other=0.0).to(tl.float32)
            )
            S = f[:, None] * S
        S = S * z[None, :] + key[:, None] * value[None, :]
        if not SHIFT:
            read += tl.sum(queries[:, :, None] * S[None, :, :], 1)
        _store_tile(after, n * G + g, keys, values, K, V, S)
    at = o + (row * H + g * R + readers)[:, None] * V + values[None, :]
    tl.store(at, read * scale, mask=(readers < R)[:, None] & (values < V)[None, :])
