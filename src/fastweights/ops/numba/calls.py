"""Calling a CPU kernel with torch's tensors: their addresses and strides, its scratch, its work shared out.

Notation
    B, T     batch, time
    H, G     query heads, key/value heads
    K, V     key and value width
    N        sequences: B, or those packed into one row by cu_seqlens
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import sequence_bounds
from .checkpoints import checkpoint_count
from .runtime import load_kernels, share_out
from .scratch import Scratch, guard_size


def check_cpu(q: Tensor, dtype: torch.dtype) -> None:
    """Whether a CPU backend can compute in `dtype` with q and what is on its device.

    Raises:
        ValueError: it is no CPU.
        TypeError: the dtype is float64.
    """
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}, but backend='cpu' needs CPU tensors; use backend='chunked'")
    if dtype == torch.float64:
        raise TypeError("backend='cpu' computes in float32, but q, k or v is float64; use backend='chunked'")


class Call:
    """The tensors of one call as a rule's kernels want them; keeps them alive while their addresses are in use.

    Args:
        rule: the folder that has the kernels.
        tensors: by name in the rule's Problem, (B, T, heads, width) or None; q, k and v among them.
        initial_state: (N, G, K, V) or None.
        cu_seqlens: bounds of packed sequences, or None.
        inclusive: whether tokens read after their own write.
        threads: on how many threads the work is shared out.
    """

    def __init__(
        self,
        rule: str,
        tensors: dict[str, Tensor | None],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        inclusive: bool,
        threads: int,
    ) -> None:
        self.tensors = {name: rows_of_float32(x) for name, x in tensors.items()}
        q, v = self.tensors["q"], self.tensors["v"]
        assert q is not None
        assert v is not None
        self.N, self.T, H, self.K = q.shape
        self.G, self.V = v.shape[2:]
        self.R = H // self.G
        self.inclusive, self.threads = inclusive, threads
        self.initial_state = None if initial_state is None else initial_state.contiguous()
        self.bounds = None
        if cu_seqlens is not None:
            self.N = len(sequence_bounds(cu_seqlens, self.T))
            self.bounds = cu_seqlens.to(torch.int64).contiguous()
        self._kernels = load_kernels(rule)
        self.parts = self._parts()

    def _parts(self) -> int:
        """Value columns are independent of each other: they make up for too few heads."""
        if self.threads <= self.N * self.G:
            return 1
        part_width = self._kernels.part_width
        return -(-self.V // part_width(self.V, -(-self.threads // max(self.N * self.G, 1))))

    def run(self, kernel: Callable, buffer_sizes: Callable, results: tuple, scale: float, **more: int) -> None:
        """Call the kernel for all units of work.

        `results` are the addresses of what it writes, `more` what the rule's Problem has beside sizes and tensors.
        """
        problem = self._kernels.Problem(
            T=self.T,
            G=self.G,
            R=self.R,
            K=self.K,
            V=self.V,
            parts=self.parts,
            inclusive=int(self.inclusive),
            cu_seqlens=address(self.bounds),
            initial_state=address(self.initial_state),
            guard=guard_size(),
            **{name: address(x) for name, x in self.tensors.items()},
            **{f"{name}_strides": strides(x) for name, x in self.tensors.items()},
            **more,
        )
        sizes, units = buffer_sizes(self.K, self.V, self.R, self.parts), self.N * self.G * self.parts
        call_kernel(kernel, problem, results, sizes, scale, units, self.threads)


def outputs(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors for o, the final state and, if `keep`, the checkpoints of a rule."""
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    checkpoints = checkpoint_count(N, T, packed=cu_seqlens is not None) if keep else 0
    return empty((B, T, H, V), v.dtype), empty((N, G, K, V)), empty((checkpoints, G, K, V))


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
