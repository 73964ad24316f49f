"""The decay rule on GPUs: Triton kernels, parallel over chunks of tokens, heads and tiles of the state.

Notation
    m        chunk: CHUNK tokens of one sequence, whose last one may have fewer; chunks of a sequence follow one another
    half     of a chunk: 0 or 1; "near" are its tokens, and "there" are those of the other half
    S        a tile (BK, BV) of the state (K, V) of one key/value head; tiles make up for few heads, and for wide states
    f, z     key-side and value-side gates, in [0, 1]; log_f, log_z their logs
    f_near   sums of the logs of f from the half's start to a token, and its own
    A        what token t reads of each token i, q_t . (gates in between) k_i; B likewise of do and v
    strong   (M, G), not 0 for a chunk in which a gate decays too much for what follows: gpu_exact.py works it out

The gates between tokens i and t of a half are e^f_near(t) e^-f_near(i): products of matrices, as long as no gate decays
so much that the second factor is too large. Between the halves both factors are at most 1: from i to the end of its
half, and from there to t. The start of a half is in its tokens' past: no output depends on what comes after it.

The gradient of a log gate at j is a sum over paths, each from a write before j to a read, or the last state, from j on.
In the last half it is what all paths that end from j on bring, S dS at the chunk's end and q dq at each t, less those
that start there, k dk at each i; in the first half, S dS at the chunk's start, and what starts before j, less what ends
there. A token's read of its own write is in both.

Tokens are rows of (tokens, heads, width). SHIFT is 1 where tokens read before their own write: token t + 1 then reads
where token t would. PRECISION is how tensor cores multiply: bfloat16 factors, "bf16", or float32 ones, "tf32" and
"tf32x3". No product here may become a WGMMA instruction, of which Triton makes wrong ones for factors that were
computed: their left factors have fewer than 64 rows, or the kernel two warps.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _rounded(x):
    """To bfloat16; for the interpreter, which cuts off where a GPU rounds to the nearest, in float32."""
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        product = tl.dot(_rounded(a), _rounded(b), out_dtype=tl.float32)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def _rows(x, rows, there, columns, width, stride, column_stride):
    """Rows of one head as (rows, columns) of float32, 0 where there is none."""
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :] * column_stride
    return tl.load(at, mask=there[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _logs(log_gate, rows, there, columns, width, stride, column_stride, GATED: tl.constexpr):
    """Logs of a gate; zeros without one."""
    if GATED:
        logs = _rows(log_gate, rows, there, columns, width, stride, column_stride)
    else:
        logs = (rows[:, None] + columns[None, :]).to(tl.float32) * 0.0
    return logs


@triton.jit
def _after(log_gate, rows, end, last, columns, width, stride, column_stride, GATED: tl.constexpr):
    """after (rows, columns), where `last` is the last of the rows."""
    there = (rows < last) & (rows + 1 < end)
    later = _logs(log_gate, rows + 1, there, columns, width, stride, column_stride, GATED)
    return tl.exp(tl.cumsum(later, 0, reverse=True))


@triton.jit
def _load_tile(S, row, keys, values, K, V):
    """A tile of a contiguous (rows, K, V), 0 beyond it."""
    at = S + row.to(tl.int64) * K * V + keys[:, None] * V + values[None, :]
    return tl.load(at, mask=(keys < K)[:, None] & (values < V)[None, :], other=0.0)


@triton.jit
def _load_sides(S, row, columns, far, D, E, column_stride, far_stride):
    """A tile of a contiguous (rows, K, V), from either side."""
    at = S + row.to(tl.int64) * D * E + columns[:, None] * column_stride + far[None, :] * far_stride
    return tl.load(at, mask=(columns < D)[:, None] & (far < E)[None, :], other=0.0)


@triton.jit
def _store_tile(S, row, keys, values, K, V, tile):
    at = S + row.to(tl.int64) * K * V + keys[:, None] * V + values[None, :]
    tl.store(at, tile, mask=(keys < K)[:, None] & (values < V)[None, :])


@triton.jit
def _store_rows(x, rows, there, columns, width, stride, tile):
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if x.dtype.element_ty == tl.bfloat16:
        tile = _rounded(tile)
    tl.store(at, tile, mask=there[:, None] & (columns < width)[None, :])


@triton.jit
def _is_strong(logs, LIMIT: tl.constexpr):
    """Whether some channel of these logs (CHUNK, columns) decays by more than e^-LIMIT within a half."""
    halves = tl.sum(tl.reshape(logs, (2, logs.shape[0] // 2, logs.shape[1])), 1)
    return tl.min(tl.min(halves, 1), 0) < -LIMIT


@triton.jit
def written(
    k, v, log_f, log_z, starts, ends, U, F, Z, strong,
    k_row, k_head, k_column, v_row, v_head, v_column, f_row, f_head, f_column, z_row, z_head, z_column,
    G, K, V,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, LIMIT: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U: what a chunk's tokens have written by its end, from a state of 0; F, Z: what it leaves of the state before.

    `strong` is 0 before, and set where it is to be.
    """
    m, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(V, BV)
    key_tile, value_tile = tile // tiles, tile % tiles
    keys, values = key_tile * BK + tl.arange(0, BK), value_tile * BV + tl.arange(0, BV)
    start, end = tl.load(starts + m), tl.load(ends + m)
    rows, last = start + tl.arange(0, CHUNK), start + CHUNK - 1

    k, v, log_f, log_z = k + g * k_head, v + g * v_head, log_f + g * f_head, log_z + g * z_head
    keys_left = _rows(k, rows, rows < end, keys, K, k_row, k_column)
    keys_left *= _after(log_f, rows, end, last, keys, K, f_row, f_column, KEY_GATE)
    values_left = _rows(v, rows, rows < end, values, V, v_row, v_column)
    values_left *= _after(log_z, rows, end, last, values, V, z_row, z_column, VALUE_GATE)
    head = m * G + g
    added = _dot(tl.trans(keys_left), values_left, PRECISION)
    _store_tile(U, head, keys, values, K, V, added)
    if value_tile == 0:
        logs = _logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE)
        tl.store(F + head.to(tl.int64) * K + keys, tl.exp(tl.sum(logs, 0)), mask=keys < K)
        if KEY_GATE:
            if _is_strong(logs, LIMIT):
                tl.store(strong + head, 1)
    if key_tile == 0:
        logs = _logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE)
        tl.store(Z + head.to(tl.int64) * V + values, tl.exp(tl.sum(logs, 0)), mask=values < V)
        if VALUE_GATE:
            if _is_strong(logs, LIMIT):
                tl.store(strong + head, 1)


@triton.jit
def read_back(
    q, do, log_f, log_z, starts, ends, sequence_starts, dU,
    q_row, q_head, q_column, do_row, do_head, do_column, f_row, f_head, f_column, z_row, z_head, z_column,
    G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU: the gradient of the state before a chunk, from what the chunk's tokens read."""
    m, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(V, BV)
    keys, values = (tile // tiles) * BK + tl.arange(0, BK), (tile % tiles) * BV + tl.arange(0, BV)
    start, end = tl.load(starts + m), tl.load(ends + m)
    log_f, log_z = log_f + g * f_head, log_z + g * z_head
    rows = start + tl.arange(0, CHUNK)
    readers = rows + SHIFT
    f_before = tl.exp(tl.cumsum(_logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE), 0)) * scale
    z_before = tl.exp(tl.cumsum(_logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE), 0))
    total = tl.zeros((BK, BV), tl.float32)
    for i in range(R):
        h = g * R + i
        queries = _rows(q + h * q_head, readers, readers < end, keys, K, q_row, q_column) * f_before
        given = _rows(do + h * do_head, readers, readers < end, values, V, do_row, do_column) * z_before
        total += _dot(tl.trans(queries), given, PRECISION)
        if SHIFT:  # the first token of a sequence reads the state before it
            if start == tl.load(sequence_starts + m):
                at = start.to(tl.int64)
                first_query = tl.load(q + h * q_head + at * q_row + keys * q_column, mask=keys < K, other=0.0)
                first_given = tl.load(do + h * do_head + at * do_row + values * do_column, mask=values < V, other=0.0)
                total += first_query.to(tl.float32)[:, None] * scale * first_given.to(tl.float32)[None, :]
    _store_tile(dU, m * G + g, keys, values, K, V, total)


@triton.jit
def scan(
    states, F, Z, first_chunks, chunk_counts, before, after,
    G, K, V, BACK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to the state before each, in place; or BACK, from each chunk's dU to dS after each.

    before, after: (N, G, K, V), the state before a sequence's first chunk and after its last; BACK reads the latter's
    gradient, and writes the former's. What the next STAGES chunks add is loaded ahead.
    """
    n, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(V, BV)
    keys, values = (tile // tiles) * BK + tl.arange(0, BK), (tile % tiles) * BV + tl.arange(0, BV)
    first, count = tl.load(first_chunks + n), tl.load(chunk_counts + n).to(tl.int32)
    if BACK:
        S = _load_tile(after, n * G + g, keys, values, K, V)
    else:
        S = _load_tile(before, n * G + g, keys, values, K, V)
    for i in tl.range(0, count, num_stages=STAGES):
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
def outputs(
    q, k, v, log_f, log_z, states, strong, starts, ends, sequence_starts, o,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    f_row, f_head, f_column, z_row, z_head, z_column,
    H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (tokens, H, V): what the tokens of a half read, in a tile of values; a tile of keys holds all of K."""
    HALF: tl.constexpr = CHUNK // 2
    m, h, half, value_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2) % 2, tl.program_id(2) // 2
    g = h // R
    start, end = tl.load(starts + m), tl.load(ends + m)
    near = start + half * HALF + tl.arange(0, HALF)
    if tl.load(strong + m * G + g) != 0:
        return
    if start + half * HALF >= end:
        return
    keys, values = tl.arange(0, BK), value_tile * BV + tl.arange(0, BV)
    q, o = q + h * q_head, o + h * V
    k, v, log_f, log_z = k + g * k_head, v + g * v_head, log_f + g * f_head, log_z + g * z_head
    S = _load_tile(states, m * G + g, keys, values, K, V)
    f_near = tl.cumsum(_logs(log_f, near, near < end, keys, K, f_row, f_column, KEY_GATE), 0)
    z_near = tl.cumsum(_logs(log_z, near, near < end, values, V, z_row, z_column, VALUE_GATE), 0)
    readers = near + SHIFT
    queries = _rows(q, readers, readers < end, keys, K, q_row, q_column) * scale * tl.exp(f_near)
    near_keys = _rows(k, near, near < end, keys, K, k_row, k_column) * tl.exp(-f_near)
    near_values = _rows(v, near, near < end, values, V, v_row, v_column) * tl.exp(-z_near)
    A = _dot(queries, tl.trans(near_keys), PRECISION)
    read = _dot(tl.where(near[:, None] >= near[None, :], A, 0.0), near_values, PRECISION)
    if half == 0:
        read += _dot(queries, S, PRECISION)
    else:
        rows = near - HALF
        f_logs = _logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE)
        z_logs = _logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE)
        f_half, z_half = tl.sum(f_logs, 0)[None, :], tl.sum(z_logs, 0)[None, :]
        first_keys = _rows(k, rows, rows < end, keys, K, k_row, k_column) * tl.exp(f_half - tl.cumsum(f_logs, 0))
        first_values = _rows(v, rows, rows < end, values, V, v_row, v_column) * tl.exp(z_half - tl.cumsum(z_logs, 0))
        A = _dot(queries, tl.trans(first_keys), PRECISION)
        read += _dot(A, first_values, PRECISION)
        read += _dot(queries * tl.exp(f_half), S, PRECISION) * tl.exp(z_half)
    _store_rows(o, readers, readers < end, values, V, H * V, read * tl.exp(z_near))
    if SHIFT:
        if (half == 0) & (start == tl.load(sequence_starts + m)):
            query = tl.load(q + start.to(tl.int64) * q_row + keys * q_column, mask=keys < K, other=0.0).to(tl.float32)
            read_first = tl.sum(query[:, None] * scale * S, 0)
            tl.store(o + start.to(tl.int64) * H * V + values, read_first, mask=values < V)


@triton.jit
def gradients(
    r, w, log_gate, x, y, far_log_gate, states, dstates, final_state, dinitial, strong, starts, ends, sequences,
    sequence_starts, dr, dw, dlog_gate,
    r_row, r_head, r_column, w_row, w_head, w_column, gate_row, gate_head, gate_column,
    x_row, x_head, x_column, y_row, y_head, y_column, far_gate_row, far_gate_head, far_gate_column,
    H, G, R, D, E, column_stride, far_stride, scale, far_scale,
    GATED: tl.constexpr, FAR_GATED: tl.constexpr, READERS: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one side of the tokens of a half: dr if READERS, dw, and dlog_gate if GATED.

    The sides are mirror images. On this one, whose columns are in tiles, r and w are q and k, and on the far one, all
    of which a tile holds, x and y are do and v: or r and w are do and v, and x and y are q and k. States are read by
    the strides of both sides' columns.
    """
    HALF: tl.constexpr = CHUNK // 2
    m, g, half, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2) % 2, tl.program_id(2) // 2
    start, end = tl.load(starts + m), tl.load(ends + m)
    if tl.load(strong + m * G + g) != 0:
        return
    if start + half * HALF >= end:
        return
    near, there = start + half * HALF + tl.arange(0, HALF), start + (1 - half) * HALF + tl.arange(0, HALF)
    readers, readers_there = near + SHIFT, there + SHIFT
    columns, far = tile * BD + tl.arange(0, BD), tl.arange(0, BE)
    w, log_gate = w + g * w_head, log_gate + g * gate_head
    y, far_log_gate = y + g * y_head, far_log_gate + g * far_gate_head
    dw, dlog_gate = dw + g * D, dlog_gate + g * D
    logs = _logs(log_gate, near, near < end, columns, D, gate_row, gate_column, GATED)
    far_logs = _logs(far_log_gate, near, near < end, far, E, far_gate_row, far_gate_column, FAR_GATED)
    before, far_before = tl.cumsum(logs, 0), tl.cumsum(far_logs, 0)
    near_w = _rows(w, near, near < end, columns, D, w_row, w_column)
    near_y = _rows(y, near, near < end, far, E, y_row, y_column)

    # What the state after the chunk has of the half's tokens, and what the last half reads of them.
    to_stop = tl.exp(tl.sum(logs, 0)[None, :] - before)
    y_left = near_y * tl.exp(tl.sum(far_logs, 0)[None, :] - far_before)
    dS = _load_sides(dstates, m * G + g, columns, far, D, E, column_stride, far_stride)
    if half == 1:
        dw_near = _dot(y_left, tl.trans(dS), PRECISION)
    else:
        logs = _logs(log_gate, there, there < end, columns, D, gate_row, gate_column, GATED)
        far_logs = _logs(far_log_gate, there, there < end, far, E, far_gate_row, far_gate_column, FAR_GATED)
        dw_near = _dot(y_left * tl.exp(tl.sum(far_logs, 0))[None, :], tl.trans(dS), PRECISION)
        dw_near *= tl.exp(tl.sum(logs, 0))[None, :]
        for i in range(R):
            h = g * R + i
            r_there = _rows(r + h * r_head, readers_there, readers_there < end, columns, D, r_row, r_column)
            x_there = _rows(x + h * x_head, readers_there, readers_there < end, far, E, x_row, x_column)
            r_there *= tl.exp(tl.cumsum(logs, 0)) * scale
            x_there *= tl.exp(tl.cumsum(far_logs, 0)) * far_scale
            dw_near += _dot(_dot(y_left, tl.trans(x_there), PRECISION), r_there, PRECISION)
    dw_near *= to_stop

    # What the half's tokens read: of what they have written themselves, of earlier ones of the half, and of the state
    # before the chunk and the first half.
    w_back, y_back = near_w * tl.exp(-before), near_y * tl.exp(-far_before)
    grads = tl.zeros((HALF, BD), tl.float32)
    for i in range(R):
        h = g * R + i
        near_r = _rows(r + h * r_head, readers, readers < end, columns, D, r_row, r_column) * scale
        near_x = _rows(x + h * x_head, readers, readers < end, far, E, x_row, x_column) * far_scale
        B_self = tl.sum(near_x * near_y, 1)[:, None]
        x_now = near_x * tl.exp(far_before)
        B = tl.where(near[:, None] > near[None, :], _dot(x_now, tl.trans(y_back), PRECISION), 0.0)
        dw_near += _dot(tl.trans(B), near_r * tl.exp(before), PRECISION) * tl.exp(-before) + B_self * near_r
        if READERS or GATED:
            dr_near = _dot(B, w_back, PRECISION)
            S = _load_sides(states, m * G + g, columns, far, D, E, column_stride, far_stride)
            if half == 0:
                dr_near += _dot(x_now, tl.trans(S), PRECISION)
            else:
                logs = _logs(log_gate, there, there < end, columns, D, gate_row, gate_column, GATED)
                far_logs = _logs(far_log_gate, there, there < end, far, E, far_gate_row, far_gate_column, FAR_GATED)
                whole, far_whole = tl.sum(logs, 0)[None, :], tl.sum(far_logs, 0)[None, :]
                dr_near += _dot(x_now * tl.exp(far_whole), tl.trans(S), PRECISION) * tl.exp(whole)
                w_there = _rows(w, there, there < end, columns, D, w_row, w_column)
                w_there *= tl.exp(whole - tl.cumsum(logs, 0))
                y_there = _rows(y, there, there < end, far, E, y_row, y_column)
                y_there *= tl.exp(far_whole - tl.cumsum(far_logs, 0))
                dr_near += _dot(_dot(x_now, tl.trans(y_there), PRECISION), w_there, PRECISION)
            dr_near = dr_near * tl.exp(before) + B_self * near_w
            grads += near_r * dr_near
            if READERS:
                _store_rows(dr + h * D, readers, readers < end, columns, D, H * D, dr_near * scale)
    _store_rows(dw, near, near < end, columns, D, G * D, dw_near)

    sequence = tl.load(sequences + m) * G + g
    is_first = start == tl.load(sequence_starts + m)
    if GATED:
        grads -= near_w * dw_near
        if half == 0:  # all paths across the chunk's start
            grads -= tl.cumsum(grads, 0)
            paths = _load_sides(states, m * G + g, columns, far, D, E, column_stride, far_stride)
            if is_first:
                paths *= _load_sides(dinitial, sequence, columns, far, D, E, column_stride, far_stride)
            else:
                paths *= _load_sides(dstates, (m - 1) * G + g, columns, far, D, E, column_stride, far_stride)
        else:  # and across its end
            grads = tl.cumsum(grads, 0, reverse=True)
            paths = _load_sides(dstates, m * G + g, columns, far, D, E, column_stride, far_stride)
            if start + CHUNK < end:
                paths *= _load_sides(states, (m + 1) * G + g, columns, far, D, E, column_stride, far_stride)
            else:
                paths *= _load_sides(final_state, sequence, columns, far, D, E, column_stride, far_stride)
        grads += tl.sum(paths, 1)[None, :]
    if SHIFT and (READERS or GATED):
        if (half == 0) & is_first:  # whose first token reads the state before it, through no gate
            S = _load_sides(states, m * G + g, columns, far, D, E, column_stride, far_stride)
            at = start.to(tl.int64)
            for i in range(R):
                h = g * R + i
                first_r = tl.load(r + h * r_head + at * r_row + columns * r_column, mask=columns < D, other=0.0)
                first_x = tl.load(x + h * x_head + at * x_row + far * x_column, mask=far < E, other=0.0)
                dr_first = tl.sum(S * (first_x.to(tl.float32) * far_scale)[None, :], 1)
                grads -= (first_r.to(tl.float32) * scale * dr_first)[None, :]
                if READERS:
                    tl.store(dr + (at * H + h) * D + columns, dr_first * scale, mask=columns < D)
    if GATED:
        _store_rows(dlog_gate, near, near < end, columns, D, G * D, grads)


@triton.jit
def step(
    q, k, v, log_f, log_z, before, o, after,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    f_row, f_head, f_column, z_row, z_head, z_column,
    H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, READERS: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One token of each sequence: decay, write and read, with the state read and written once."""
    n, g, value_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    values, readers = value_tile * BV + tl.arange(0, BV), tl.arange(0, READERS)
    row = n.to(tl.int64)
    value = tl.load(v + row * v_row + g * v_head + values * v_column, mask=values < V, other=0.0).to(tl.float32)
    z = tl.full((BV,), 1.0, tl.float32)
    if VALUE_GATE:
        z = tl.exp(
            tl.load(log_z + row * z_row + g * z_head + values * z_column, mask=values < V, other=0.0).to(tl.float32)
        )
    read = tl.zeros((READERS, BV), tl.float32)
    for first in range(0, K, BK):
        keys = first + tl.arange(0, BK)
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
