"""The delta rule on GPUs: Triton kernels for what goes from one chunk of tokens to the next.

Notation
    n, g     sequence, key/value head
    m        chunk: L tokens; the chunks of a sequence follow one another
    S, dS    columns (K, BV) of the state before a chunk, and of the gradient of the state after it
    W        (L, K) of a chunk: what is written is less by W S (`k_erased` of chunked.py)
    E        (L, K) of a chunk: its keys, decayed to its end
    u, du    (L, V) of a chunk: what its tokens write, and its gradient
    c        what a chunk leaves of the state before it

Tensors are contiguous, blocks of (L, width), or (K, V) for states; chunk i of sequence n and head g is block
first[n] * SEQUENCE + g * HEAD + i. Whoever launches them takes two warps: products of 64 rows by four may become
instructions that Triton 3.4 to 3.6 compiles wrongly for Hopper cards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(x, block, rows, columns, height, width):
    """Rows and columns of the block-th (height, width) of a contiguous tensor; 0 beyond it."""
    at = x + block.to(tl.int64) * height * width + rows[:, None] * width + columns[None, :]
    return tl.load(at, mask=(rows < height)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _store(x, block, rows, columns, height, width, tile):
    at = x + block.to(tl.int64) * height * width + rows[:, None] * width + columns[None, :]
    tl.store(at, tile, mask=(rows < height)[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["G", "SEQUENCE", "HEAD"])
def write(
    u_own, W, E, c, first_chunks, chunk_counts, before, u, states, after,
    G, SEQUENCE, HEAD, K, V, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the state before each sequence (N, G, K, V) to the one after it, with u and the state before each chunk."""
    n, g = tl.program_id(0), tl.program_id(1)
    keys, values, tokens = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, L)
    first, count = tl.load(first_chunks + n) * SEQUENCE + g * HEAD, tl.load(chunk_counts + n)
    S = _tile(before, n * G + g, keys, values, K, V)
    for i in range(count):
        block = first + i
        _store(states, block, keys, values, K, V, S)
        erased = tl.dot(_tile(W, block, tokens, keys, L, K), S, input_precision="tf32x3")
        written = _tile(u_own, block, tokens, values, L, V) - erased
        _store(u, block, tokens, values, L, V, written)
        added = tl.dot(tl.trans(_tile(E, block, tokens, keys, L, K)), written, input_precision="tf32x3")
        S = tl.load(c + block) * S + added
    _store(after, n * G + g, keys, values, K, V, S)


@triton.jit(do_not_specialize=["G", "SEQUENCE", "HEAD"])
def write_back(
    W, E, c, first_chunks, chunk_counts, dafter, du_read, dstates_read, du, dS_after, dbefore,
    G, SEQUENCE, HEAD, K, V, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradients of u and of the state after each chunk, and before each sequence.

    du_read, dstates_read: those of u and of the states before chunks that come from what the chunks' tokens read.
    """
    n, g = tl.program_id(0), tl.program_id(1)
    keys, values, tokens = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, L)
    first, count = tl.load(first_chunks + n) * SEQUENCE + g * HEAD, tl.load(chunk_counts + n)
    dS = _tile(dafter, n * G + g, keys, values, K, V)
    for i in range(count):
        block = first + count - 1 - i
        _store(dS_after, block, keys, values, K, V, dS)
        later = tl.dot(_tile(E, block, tokens, keys, L, K), dS, input_precision="tf32x3")
        dwritten = _tile(du_read, block, tokens, values, L, V) + later
        _store(du, block, tokens, values, L, V, dwritten)
        erased = tl.dot(tl.trans(_tile(W, block, tokens, keys, L, K)), dwritten, input_precision="tf32x3")
        dS = _tile(dstates_read, block, keys, values, K, V) + tl.load(c + block) * dS - erased
    _store(dbefore, n * G + g, keys, values, K, V, dS)


@triton.jit
def step(
    q, k, v, beta, log_decay, before, o, after,
    q_row, q_head, q_column, k_row, k_head, k_column, v_row, v_head, v_column, b_row, b_head, a_row, a_head,
    H, G, R, K, V, scale,
    DECAY: tl.constexpr, INCLUSIVE: tl.constexpr, READERS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of each sequence: recall, write and read, with the state read and written once."""
    n, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys, values, readers = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, READERS)
    row = n.to(tl.int64)
    S = _tile(before, n * G + g, keys, values, K, V)
    heads = (g * R + readers)[:, None] * q_head
    asked = (readers < R)[:, None] & (keys < K)[None, :]
    queries = tl.load(q + row * q_row + heads + keys[None, :] * q_column, mask=asked, other=0.0).to(tl.float32) * scale
    key = tl.load(k + row * k_row + g * k_head + keys * k_column, mask=keys < K, other=0.0).to(tl.float32)
    value = tl.load(v + row * v_row + g * v_head + values * v_column, mask=values < V, other=0.0).to(tl.float32)
    read = tl.sum(queries[:, :, None] * S[None, :, :], 1)
    if DECAY:
        S *= tl.exp(tl.load(log_decay + row * a_row + g * a_head).to(tl.float32))
    error = value - tl.sum(key[:, None] * S, 0)
    S += key[:, None] * (tl.load(beta + row * b_row + g * b_head).to(tl.float32) * error)[None, :]
    if INCLUSIVE:
        read = tl.sum(queries[:, :, None] * S[None, :, :], 1)
    _store(after, n * G + g, keys, values, K, V, S)
    at = o + (row * H + g * R + readers)[:, None] * V + values[None, :]
    tl.store(at, read, mask=(readers < R)[:, None] & (values < V)[None, :])
