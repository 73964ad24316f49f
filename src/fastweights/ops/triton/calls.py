"""What any rule's kernels on GPUs need: whether they can run, and where chunks of packed sequences lie.

Nothing here waits for the GPU: the bounds of packed sequences stay there.

Notation
    N        sequences: B, or those packed into one row by cu_seqlens
    M        chunks of all sequences
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def check_gpu(q: Tensor, dtype: torch.dtype) -> None:
    """Whether these kernels can run.

    Raises:
        TypeError: the state would be float64.
        ValueError: the tensors are not on a GPU.
        ImportError: Triton is not installed.
    """
    if dtype == torch.float64:
        raise TypeError("backend='gpu' computes in float32, but q, k or v is float64; use backend='chunked'")
    if q.device.type != "cuda" and not (q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"backend='gpu' needs tensors on a GPU, but q is on {q.device}; use backend='auto'")
    if not torch.compiler.is_compiling() and not is_available():
        raise ImportError("backend='gpu' needs Triton, which is not installed: pip install triton")


@cache
def is_available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


_suits: bool | None = None


def suits_this_machine() -> bool:
    """Whether `backend="auto"` may take these kernels: Triton is here, and a GPU that can multiply TF32.

    A program that is being compiled cannot ask: it goes by what was found before, and without that takes them to be
    right, as whoever compiles for a GPU has Triton.
    """
    global _suits
    if torch.compiler.is_compiling():
        return _suits is not False
    if _suits is None:
        _suits = is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
    return _suits


class Chunks(NamedTuple):
    """Where chunks and sequences start and end in rows of tokens; nothing of it is known outside of the GPU."""

    starts: Int[Tensor, " M"]
    """First token of each chunk; chunks that are not needed start, and end, at 0."""
    ends: Int[Tensor, " M"]
    """End of the sequence of each chunk."""
    sequence_starts: Int[Tensor, " M"]
    """Start of it; -1 for a chunk that is not needed."""
    first: Int[Tensor, " N"]
    """First chunk of each sequence."""
    counts: Int[Tensor, " N"]
    """Chunks of each sequence."""


def chunks_of(q: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """Those of q (B, T, H, K).

    Args:
        q: a tensor on a GPU.
        cu_seqlens: as `decay_rule` takes it.
        size: tokens in a chunk.
    """
    B, T = q.shape[:2]
    if cu_seqlens is None:
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
        if q.is_cuda and torch.cuda.is_current_stream_capturing():  # what is made there is the graph's alone
            return _even_chunks.__wrapped__(B, T, size, q.device, stream)
        return _even_chunks(B, T, size, q.device, stream)
    # So many at most: how many there are is known on the GPU alone.
    return _cut(cu_seqlens.to(q.device, torch.int64, non_blocking=True), T // size + len(cu_seqlens) - 1, size)


@lru_cache(maxsize=64)
def _even_chunks(B: int, T: int, size: int, device: torch.device, stream: int) -> Chunks:
    """Kept for each stream, as another may read it before it is there."""
    return _cut(torch.arange(B + 1, device=device) * T, B * -(-T // size), size)


def _cut(bounds: Tensor, M: int, size: int) -> Chunks:
    counts = (bounds.diff() + size - 1) // size
    ends = counts.cumsum(0)
    chunks = torch.arange(M, device=bounds.device)
    sequence = torch.searchsorted(ends, chunks, right=True)
    needed = sequence < len(counts)
    sequence = sequence.clamp(max=len(counts) - 1)
    start = bounds[sequence] + (chunks - (ends - counts)[sequence]) * size
    return Chunks(
        starts=torch.where(needed, start, 0),
        ends=torch.where(needed, bounds[1:][sequence], 0),
        sequence_starts=torch.where(needed, bounds[sequence], -1),
        first=ends - counts,
        counts=counts,
    )


def side(width: int, longest: int) -> int:
    """Of a tile that has so many channels, or the first of them: a power of two, as products need at least 16."""
    return min(longest, max(16, 1 << (width - 1).bit_length()))


def or_zeros(state: Tensor | None, like: Tensor) -> Tensor:
    """A state, or for None one of zeros like another."""
    return torch.zeros_like(like) if state is None else state.contiguous()


def empty_outputs(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """o (B, T, H, V) and the final state (N, G, K, V), still to be written."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = v.new_empty((N, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return v.new_empty((*q.shape[:3], v.shape[3])), final_state
