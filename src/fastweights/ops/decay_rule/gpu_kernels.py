"""The decay rule on GPUs: Triton kernels, parallel over chunks of tokens, heads and tiles of the state.

Notation
    m        chunk: CHUNK tokens of one sequence, whose last one may have fewer; chunks of a sequence follow one another
    r        sub-chunk: SUB tokens of a chunk
    S        a tile (BK, BV) of the state (K, V) of one key/value head; tiles make up for few heads, and for wide states
    f, z     key-side and value-side gates, in [0, 1]; log_f, log_z their logs
    "cum"    product of the gates from the sub-chunk's start to a token, and its own
    "after"  product of the gates after a token, to the sub-chunk's end
    lag      how many tokens lie between a write and a read of one sub-chunk
    A        (tokens, heads, SUB), what token t reads of the token `lag` before it, q_t . (gates in between) k; B
             likewise of do and v

Each product of gates is e to the sum of the logs of exactly these steps, or a running product of them: never above 1,
never a quotient, never a difference of two running sums, which would cancel; so a log gate may be -inf. Every sum of
the gradients of gates is one over paths through a token, of which nothing is subtracted, either.

Tokens are rows of (tokens, heads, width). SHIFT is 1 where tokens read before their own write: token t + 1 then reads
where token t would.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _store_tile(S, row, keys, values, K, V, tile):
    at = S + row.to(tl.int64) * K * V + keys[:, None] * V + values[None, :]
    tl.store(at, tile, mask=(keys < K)[:, None] & (values < V)[None, :])


@triton.jit
def _store_rows(x, rows, there, columns, width, stride, tile):
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, tile, mask=there[:, None] & (columns < width)[None, :])


@triton.jit
def _written_on(
    S, k, v, log_f, log_z, rows, end, last, keys, values, K, V,
    k_row, k_column, v_row, v_column, f_row, f_column, z_row, z_column,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after these rows, from the one before them."""
    keys_left = _rows(k, rows, rows < end, keys, K, k_row, k_column)
    keys_left *= _after(log_f, rows, end, last, keys, K, f_row, f_column, KEY_GATE)
    values_left = _rows(v, rows, rows < end, values, V, v_row, v_column)
    values_left *= _after(log_z, rows, end, last, values, V, z_row, z_column, VALUE_GATE)
    f = tl.exp(tl.sum(_logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE), 0))
    z = tl.exp(tl.sum(_logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE), 0))
    return f[:, None] * z[None, :] * S + tl.dot(tl.trans(keys_left), values_left, input_precision=PRECISION)


@triton.jit
def written(
    k, v, log_f, log_z, starts, ends, U, F, Z,
    k_row, k_head, k_column, v_row, v_head, v_column, f_row, f_head, f_column, z_row, z_head, z_column,
    G, K, V,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U: what a chunk's tokens have written by its end, from a state of 0; F, Z: what it leaves of the state before."""
    m, g, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
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
    added = tl.dot(tl.trans(keys_left), values_left, input_precision=PRECISION)
    _store_tile(U, head, keys, values, K, V, added)
    if value_tile == 0:
        logs = _logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE)
        tl.store(F + head.to(tl.int64) * K + keys, tl.exp(tl.sum(logs, 0)), mask=keys < K)
    if key_tile == 0:
        logs = _logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE)
        tl.store(Z + head.to(tl.int64) * V + values, tl.exp(tl.sum(logs, 0)), mask=values < V)


@triton.jit
def read_back(
    q, do, log_f, log_z, starts, ends, sequence_starts, dU,
    q_row, q_head, q_column, do_row, do_head, do_column, f_row, f_head, f_column, z_row, z_head, z_column,
    G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU: the gradient of the state before a chunk, from what the chunk's tokens read."""
    m, g, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    tiles = tl.cdiv(V, BV)
    keys, values = (tile // tiles) * BK + tl.arange(0, BK), (tile % tiles) * BV + tl.arange(0, BV)
    start, end = tl.load(starts + m), tl.load(ends + m)
    log_f, log_z = log_f + g * f_head, log_z + g * z_head
    total = tl.zeros((BK, BV), tl.float32)
    if SHIFT:  # the first token of a sequence reads the state before it
        rows = start + tl.arange(0, SUB)
        first = (rows == tl.load(sequence_starts + m)) & (rows < end)
        for i in range(R):
            h = g * R + i
            queries = _rows(q + h * q_head, rows, first, keys, K, q_row, q_column) * scale
            given = _rows(do + h * do_head, rows, first, values, V, do_row, do_column)
            total += tl.dot(tl.trans(queries), given, input_precision=PRECISION)

    f_before, z_before = tl.full((BK,), 1.0, tl.float32), tl.full((BV,), 1.0, tl.float32)
    for sub in range(tl.cdiv(tl.minimum(end - start, CHUNK), SUB)):
        rows = start + sub * SUB + tl.arange(0, SUB)
        readers = rows + SHIFT
        f_logs = _logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE)
        z_logs = _logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE)
        f_cum, z_cum = (
            f_before[None, :] * tl.exp(tl.cumsum(f_logs, 0)),
            z_before[None, :] * tl.exp(tl.cumsum(z_logs, 0)),
        )
        for i in range(R):
            h = g * R + i
            queries = _rows(q + h * q_head, readers, readers < end, keys, K, q_row, q_column) * f_cum * scale
            given = _rows(do + h * do_head, readers, readers < end, values, V, do_row, do_column) * z_cum
            total += tl.dot(tl.trans(queries), given, input_precision=PRECISION)
        f_before *= tl.exp(tl.sum(f_logs, 0))
        z_before *= tl.exp(tl.sum(z_logs, 0))
    _store_tile(dU, m * G + g, keys, values, K, V, total)


@triton.jit
def scan(
    states, F, Z, first_chunks, chunk_counts, before, after,
    G, K, V, BACK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to the state before each, in place; or BACK, from each chunk's dU to dS after each.

    before, after: (N, G, K, V), the state before a sequence's first chunk and after its last; BACK reads the latter's
    gradient, and writes the former's.
    """
    n, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(V, BV)
    keys, values = (tile // tiles) * BK + tl.arange(0, BK), (tile % tiles) * BV + tl.arange(0, BV)
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
    x, y, log_gate, starts, ends, A,
    x_row, x_head, x_column, y_row, y_head, y_column, gate_row, gate_head, gate_column,
    H, R, D, scale,
    GATED: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A[t, h, lag] = scale * x_t . (gates in between) y_{t - lag}, for lags that do not leave the sub-chunk; else 0."""
    m, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = tl.load(starts + m), tl.load(ends + m)
    g = h // R
    x, y, log_gate = x + h * x_head, y + g * y_head, log_gate + g * gate_head
    position, lags = tl.arange(0, CHUNK), tl.arange(0, SUB)
    rows = start + position
    readers = rows + SHIFT
    total = tl.zeros((CHUNK, SUB), tl.float32)
    for first in range(0, D, BD):
        columns = first + tl.arange(0, BD)
        reading = _rows(x, readers, readers < end, columns, D, x_row, x_column) * scale
        for lag in range(SUB):
            there = (position % SUB >= lag) & (rows < end)
            if GATED:
                passed = there & (lag > 0)
                steps = _rows(log_gate, rows - lag + 1, passed, columns, D, gate_row, gate_column)
                reading *= tl.exp(steps)
            product = tl.sum(reading * _rows(y, rows - lag, there, columns, D, y_row, y_column), 1)
            total += tl.where(lags[None, :] == lag, product[:, None], 0.0)
    at = A + (rows.to(tl.int64)[:, None] * H + h) * SUB + lags[None, :]
    tl.store(at, total, mask=(rows < end)[:, None])


@triton.jit
def outputs(
    q, k, v, log_f, log_z, A, states, starts, ends, sequence_starts, o,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    f_row, f_head, f_column, z_row, z_head, z_column,
    tokens, H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (key tiles, tokens, H, V): what each token reads; its sum over the key tiles is the output."""
    m, h, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    g, tiles = h // R, tl.cdiv(V, BV)
    key_tile, value_tile = tile // tiles, tile % tiles
    keys, values = key_tile * BK + tl.arange(0, BK), value_tile * BV + tl.arange(0, BV)
    start, end = tl.load(starts + m), tl.load(ends + m)
    q, o = q + h * q_head, o + (key_tile.to(tl.int64) * tokens * H + h) * V
    k, v, log_f, log_z = k + g * k_head, v + g * v_head, log_f + g * f_head, log_z + g * z_head
    S = _load_tile(states, m * G + g, keys, values, K, V)
    if SHIFT:
        if start == tl.load(sequence_starts + m):
            query = tl.load(q + start.to(tl.int64) * q_row + keys * q_column, mask=keys < K, other=0.0).to(tl.float32)
            read = tl.sum(query[:, None] * scale * S, 0)
            tl.store(o + start.to(tl.int64) * H * V + values, read, mask=values < V)

    position = tl.arange(0, SUB)
    for sub in range(tl.cdiv(tl.minimum(end - start, CHUNK), SUB)):
        rows = start + sub * SUB + position
        f_cum = tl.exp(tl.cumsum(_logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE), 0))
        z_cum = tl.exp(tl.cumsum(_logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE), 0))
        readers = rows + SHIFT
        queries = _rows(q, readers, readers < end, keys, K, q_row, q_column) * scale
        read = tl.dot(queries * f_cum, S, input_precision=PRECISION) * z_cum
        if key_tile == 0:
            decay = tl.full((SUB, BV), 1.0, tl.float32)
            for lag in range(SUB):
                near = (position >= lag) & (rows < end)
                if VALUE_GATE:
                    decay *= tl.exp(_rows(log_z, rows - lag + 1, near & (lag > 0), values, V, z_row, z_column))
                a = tl.load(A + (rows.to(tl.int64) * H + h) * SUB + lag, mask=near, other=0.0)
                read += a[:, None] * decay * _rows(v, rows - lag, near, values, V, v_row, v_column)
        _store_rows(o, readers, readers < end, values, V, H * V, read)
        S = _written_on(
            S, k, v, log_f, log_z, rows, end, start + sub * SUB + SUB - 1, keys, values, K, V,
            k_row, k_column, v_row, v_column, f_row, f_column, z_row, z_column, KEY_GATE, VALUE_GATE, PRECISION,
        )  # fmt: skip


@triton.jit
def gradients(
    q, k, v, log_f, log_z, do, A, B, states, dstates, starts, ends, sequence_starts, dq, dk, dv, dlog_f, dlog_z,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    f_row, f_head, f_column, z_row, z_head, z_column, do_row, do_head, do_column,
    tokens, H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk's tokens, from its last sub-chunk to its first.

    dq, dk and dlog_f are (value tiles, tokens, heads, K), dv and dlog_z (key tiles, tokens, heads, V): parts of a sum.
    """
    m, g, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    tiles = tl.cdiv(V, BV)
    key_tile, value_tile = tile // tiles, tile % tiles
    keys, values = key_tile * BK + tl.arange(0, BK), value_tile * BV + tl.arange(0, BV)
    start, end = tl.load(starts + m), tl.load(ends + m)
    k, v, log_f, log_z = k + g * k_head, v + g * v_head, log_f + g * f_head, log_z + g * z_head
    part, value_part = value_tile.to(tl.int64) * tokens, key_tile.to(tl.int64) * tokens
    dq, dk, dlog_f = dq + part * H * K, dk + (part * G + g) * K, dlog_f + (part * G + g) * K
    dv, dlog_z = dv + (value_part * G + g) * V, dlog_z + (value_part * G + g) * V
    S_start = _load_tile(states, m * G + g, keys, values, K, V)
    dS = _load_tile(dstates, m * G + g, keys, values, K, V)
    position = tl.arange(0, SUB)
    before = (position[:, None] > position[None, :]).to(tl.float32)

    subs = tl.cdiv(tl.minimum(end - start, CHUNK), SUB)
    for back in range(subs):
        sub = subs - 1 - back
        S = S_start
        for earlier in range(sub):
            S = _written_on(
                S, k, v, log_f, log_z, start + earlier * SUB + position, end, start + earlier * SUB + SUB - 1,
                keys, values, K, V, k_row, k_column, v_row, v_column, f_row, f_column, z_row, z_column,
                KEY_GATE, VALUE_GATE, PRECISION,
            )  # fmt: skip

        rows, last = start + sub * SUB + position, start + sub * SUB + SUB - 1
        f_logs = _logs(log_f, rows, rows < end, keys, K, f_row, f_column, KEY_GATE)
        z_logs = _logs(log_z, rows, rows < end, values, V, z_row, z_column, VALUE_GATE)
        f_cum, f_whole = tl.exp(tl.cumsum(f_logs, 0)), tl.exp(tl.sum(f_logs, 0))
        z_cum, z_whole = tl.exp(tl.cumsum(z_logs, 0)), tl.exp(tl.sum(z_logs, 0))
        f_after = _after(log_f, rows, end, last, keys, K, f_row, f_column, KEY_GATE)
        z_after = _after(log_z, rows, end, last, values, V, z_row, z_column, VALUE_GATE)
        k_rows = _rows(k, rows, rows < end, keys, K, k_row, k_column)
        v_rows = _rows(v, rows, rows < end, values, V, v_row, v_column)
        readers = rows + SHIFT

        # Paths from tokens of the sub-chunk to later ones, and from earlier tokens to later ones.
        k_grads = tl.dot(v_rows * z_after, tl.trans(dS), input_precision=PRECISION) * f_after
        v_grads = tl.dot(k_rows * f_after, dS, input_precision=PRECISION) * z_after
        kept = f_whole[:, None] * z_whole[None, :] * dS
        f_grads = tl.dot(before, k_rows * k_grads, input_precision=PRECISION) + tl.sum(kept * S, 1)[None, :]
        z_grads = tl.dot(before, v_rows * v_grads, input_precision=PRECISION) + tl.sum(kept * S, 0)[None, :]
        dS = kept

        for i in range(R):
            h = g * R + i
            q_rows = _rows(q + h * q_head, readers, readers < end, keys, K, q_row, q_column) * scale
            do_rows = _rows(do + h * do_head, readers, readers < end, values, V, do_row, do_column)
            # Paths from earlier tokens to reads of the sub-chunk.
            q_grads = tl.dot(do_rows * z_cum, tl.trans(S), input_precision=PRECISION) * f_cum
            read = tl.dot(q_rows * f_cum, S, input_precision=PRECISION) * z_cum
            f_grads += tl.cumsum(q_rows * q_grads, 0, reverse=True)
            z_grads += tl.cumsum(do_rows * read, 0, reverse=True)
            dS += tl.dot(tl.trans(q_rows * f_cum), do_rows * z_cum, input_precision=PRECISION)
            # Paths inside the sub-chunk.
            if value_tile == 0:
                decay = tl.full((SUB, BK), 1.0, tl.float32)
                decay_on = tl.full((SUB, BK), 1.0, tl.float32)
                for lag in range(SUB):
                    near, far = (position >= lag) & (rows < end), (position + lag < SUB) & (rows + lag < end)
                    if KEY_GATE:
                        decay *= tl.exp(_rows(log_f, rows - lag + 1, near & (lag > 0), keys, K, f_row, f_column))
                        decay_on *= tl.exp(_rows(log_f, rows + lag, far & (lag > 0), keys, K, f_row, f_column))
                    b = tl.load(B + (rows.to(tl.int64) * H + h) * SUB + lag, mask=near, other=0.0)
                    from_key = b[:, None] * decay * _rows(k, rows - lag, near, keys, K, k_row, k_column)
                    q_grads += from_key
                    if KEY_GATE:
                        over = (position[:, None] <= position[None, :]) & (position[None, :] < position[:, None] + lag)
                        f_grads += tl.dot(over.to(tl.float32), q_rows * from_key, input_precision=PRECISION)
                    b = tl.load(B + ((rows + lag).to(tl.int64) * H + h) * SUB + lag, mask=far, other=0.0)
                    read_there = far & (readers + lag < end)
                    reading = _rows(q + h * q_head, readers + lag, read_there, keys, K, q_row, q_column)
                    k_grads += b[:, None] * decay_on * reading * scale
            if key_tile == 0:
                value_decay = tl.full((SUB, BV), 1.0, tl.float32)
                value_decay_on = tl.full((SUB, BV), 1.0, tl.float32)
                for lag in range(SUB):
                    near, far = (position >= lag) & (rows < end), (position + lag < SUB) & (rows + lag < end)
                    if VALUE_GATE:
                        value_decay *= tl.exp(
                            _rows(log_z, rows - lag + 1, near & (lag > 0), values, V, z_row, z_column)
                        )
                        value_decay_on *= tl.exp(_rows(log_z, rows + lag, far & (lag > 0), values, V, z_row, z_column))
                        a = tl.load(A + (rows.to(tl.int64) * H + h) * SUB + lag, mask=near, other=0.0)
                        read = a[:, None] * value_decay * _rows(v, rows - lag, near, values, V, v_row, v_column)
                        over = (position[:, None] <= position[None, :]) & (position[None, :] < position[:, None] + lag)
                        z_grads += tl.dot(over.to(tl.float32), do_rows * read, input_precision=PRECISION)
                    a = tl.load(A + ((rows + lag).to(tl.int64) * H + h) * SUB + lag, mask=far, other=0.0)
                    read_there = far & (readers + lag < end)
                    given = _rows(do + h * do_head, readers + lag, read_there, values, V, do_row, do_column)
                    v_grads += a[:, None] * value_decay_on * given
            _store_rows(dq + h * K, readers, readers < end, keys, K, H * K, q_grads * scale)
            if SHIFT:
                first = (rows == tl.load(sequence_starts + m)) & (rows < end)
                given = _rows(do + h * do_head, rows, first, values, V, do_row, do_column)
                first_grads = tl.dot(given, tl.trans(S), input_precision=PRECISION) * scale
                _store_rows(dq + h * K, rows, first, keys, K, H * K, first_grads)

        _store_rows(dk, rows, rows < end, keys, K, G * K, k_grads)
        _store_rows(dv, rows, rows < end, values, V, G * V, v_grads)
        if KEY_GATE:
            _store_rows(dlog_f, rows, rows < end, keys, K, G * K, f_grads)
        if VALUE_GATE:
            _store_rows(dlog_z, rows, rows < end, values, V, G * V, z_grads)


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
    n, g, value_tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
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
