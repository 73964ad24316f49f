"""Calling a CPU kernel with torch's tensors: their addresses and strides, its scratch, its work shared out."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .runtime import share_out
from .scratch import Scratch


def call_kernel(
    kernel: Callable, problem: Any, results: Any, sizes: Any, scale: float, units: int, threads: int
) -> None:
    """Run `kernel` for all units of work; the caller keeps alive all tensors whose addresses it gives.

    Args:
        kernel: kernel(problem, results, scratch, scale, first unit, end), the first three of which are addresses.
        problem: named tuple of numbers and triples of numbers, read by `vectors.record_at`, with a field `guard`.
        results: likewise, the addresses of what the kernel writes.
        sizes: named tuple of how many float32 numbers each buffer of the kernel's scratch has.
        scale: factor of the outputs.
        units: number of independent units of work.
        threads: on how many threads they are shared out.
    """
    guard, problem, results = problem.guard, _numbers(problem), _numbers(results)
    at, to = problem.buffer_info()[0], results.buffer_info()[0]

    def work(first: int, end: int) -> None:
        scratch = Scratch(sizes, guard)
        kernel(at, to, scratch.address, scale, first, end)
        scratch.check()

    share_out(work, units, threads)


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A new tensor for a kernel to fill."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def rows_of_float32(x: Tensor | None) -> Tensor | None:
    """x as the kernels read it: float32 with a contiguous last dimension; x itself where it is that already."""
    if x is None:
        return None
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def address(x: Tensor | None) -> int:
    """Where x lies in memory; 0 for None."""
    return 0 if x is None else x.data_ptr()


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Those of batch, token and head."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def _numbers(record: tuple) -> array:
    return array("q", [x for field in record for x in (field if isinstance(field, tuple) else (field,))])
