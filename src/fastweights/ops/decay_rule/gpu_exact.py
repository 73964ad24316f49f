"""Kernels for chunks with a gate that decays so much that no quotient of its products can be formed, or is 0.

Their sub-chunks of SUB tokens are compared pair by pair: slower than the products of gpu_kernels.py, whose notation
this is, and exact for any gate. Each program looks in `strong` whether its chunk is one of these.

Notation
    "cum"    product of the gates from the sub-chunk's start to a token, and its own
    "after"  product of the gates after a token, to the sub-chunk's end
    lag      how many tokens lie between a write and a read of one sub-chunk
    A        (tokens, heads, SUB), what token t reads of the token `lag` before it, q_t . (gates in between) k; B
             likewise of do and v

Each product of gates is e to the sum of the logs of exactly these steps, or a running product of them: never above 1,
never a quotient, never a difference of two running sums, which would cancel; so a log gate may be -inf. Every sum of
the gradients of gates is one over paths through a token, of which nothing is subtracted, either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gpu_kernels import _after, _load_tile, _logs, _rows, _store_rows


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
def pairs(
    x, y, log_gate, strong, starts, ends, A,
    x_row, x_head, x_column, y_row, y_head, y_column, gate_row, gate_head, gate_column,
    H, G, R, D, scale,
    GATED: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A[t, h, lag] = scale * x_t . (gates in between) y_{t - lag}, for lags that do not leave the sub-chunk; else 0."""
    m, h = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + m), tl.load(ends + m)
    g = h // R
    if tl.load(strong + m * G + g) == 0:
        return
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
def exact_outputs(
    q, k, v, log_f, log_z, A, states, strong, starts, ends, sequence_starts, o,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    f_row, f_head, f_column, z_row, z_head, z_column,
    tokens, H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (key tiles, tokens, H, V): what each token reads; its sum over the key tiles is the output."""
    m, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, tiles = h // R, tl.cdiv(V, BV)
    if tl.load(strong + m * G + g) == 0:
        return
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
def exact_gradients(
    q, k, v, log_f, log_z, do, A, B, states, dstates, strong, starts, ends, sequence_starts,
    dq, dk, dv, dlog_f, dlog_z,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column,
    f_row, f_head, f_column, z_row, z_head, z_column, do_row, do_head, do_column,
    tokens, H, G, R, K, V, scale,
    KEY_GATE: tl.constexpr, VALUE_GATE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk's tokens, from its last sub-chunk to its first.

    dq, dk and dlog_f are (value tiles, tokens, heads, K), dv and dlog_z (key tiles, tokens, heads, V): parts of a sum.
    """
    m, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(strong + m * G + g) == 0:
        return
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
def join(
    parts, whole, strong, starts, ends, sequence_starts, count, tokens, H, G, R, D,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """whole (tokens, H, D): the sum of the parts (count, tokens, H, D), for the tokens that exact kernels work out."""
    m, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(strong + m * G + h // R) == 0:
        return
    columns = tile * BD + tl.arange(0, BD)
    start, end = tl.load(starts + m), tl.load(ends + m)
    rows = start + tl.arange(0, 2 * CHUNK)
    first = start + SHIFT
    if start == tl.load(sequence_starts + m):
        first = start
    there = (rows >= first) & (rows < tl.minimum(end, start + CHUNK + SHIFT))
    total = tl.zeros((2 * CHUNK, BD), tl.float32)
    size = tl.cast(tokens, tl.int64) * H * D
    for part in range(count):
        from_part = parts + part * size + h * D
        total += _rows(from_part, rows, there, columns, D, H * D, 1)
    _store_rows(whole + h * D, rows, there, columns, D, H * D, total)
