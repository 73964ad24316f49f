"""A few rows of float32 times a matrix of four or eight bits, as fast as the matrix is read from memory.

torch's own kernels for such matrices turn each number of the matrix into a float first, which takes two to three times
as long as reading it (docs/log.md). Here the rows are rounded to whole numbers and multiplied as these, by VNNI or what
AVX2 has in its place: to fifteen bits, relative to the largest of each group of 32, so that less is lost than where
rows are rounded to bf16. Of many rows, which for a matrix of four bits are all of the work, groups that matter less are
rounded to eight.

Notation
    m, n     outputs and inputs of the matrix; a group is 32 inputs
    L        outputs that are computed at once, one a lane of a vector: 16 with AVX-512, 8 without
    packed   L rows of the matrix after another; of each, 64 or 32 bytes (one vector) hold four inputs of each row, or
             with four bits eight, of which the first four in the lower halves
"""

from __future__ import annotations

import importlib
from array import array
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..numba.runtime import load_kernels, run_on_team, task_of

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Int8, UInt8

GROUP = 32
LANES = 8, 16
"""What L may be."""
FEW = 16
"""Rows up to which all are rounded to fifteen bits; of more, for a matrix of four, groups that matter less to eight."""
_WORTH_A_TEAM = 500_000
"""Products, or numbers of a matrix; one thread makes fewer before others have woken up."""
_SUMMED = 256
"""Blocks of L rows of a matrix whose sum has a place of its own, whatever the number of threads."""
_SAME_AS = 4
"""Products, that take as long as a number of a row that is rounded."""


@cache
def lanes() -> int:
    """L on this machine; 0 where it has no such kernel: without AVX2, or Numba."""
    try:
        vectors = importlib.import_module("..numba.vectors", __package__)
    except ImportError:
        return 0
    needed = "+avx512bw" if vectors.LANES == 16 else "+avx2"
    return vectors.LANES if needed in vectors.FEATURES else 0


def takes(n: int, m: int) -> bool:
    """Whether there is a kernel for a matrix of this size."""
    return bool(lanes()) and n % GROUP == 0 and m % lanes() == 0


def pack_four(numbers: UInt8[Tensor, "m n"]) -> UInt8[Tensor, "m half"]:
    """Whole numbers from 0 to 15 in the order of the kernel."""
    first, second = _by_lanes(numbers, 8).unflatten(3, (2, 4)).unbind(3)
    return (first | second << 4).reshape(len(numbers), -1)


def unpack_four(packed: UInt8[Tensor, "m half"], block: int) -> UInt8[Tensor, "m n"]:
    """What `pack_four` was given, on a machine where L was `block`."""
    m, half = packed.shape
    by_lanes = packed.view(m // block, half // 4, block, 4)
    numbers = torch.stack((by_lanes & 15, by_lanes >> 4), 3)
    return numbers.transpose(1, 2).reshape(m, 2 * half)


def pack_eight(numbers: Int8[Tensor, "m n"]) -> Int8[Tensor, "m n"]:
    """Whole numbers from -127 to 127 in the order of the kernel, which wants 128 more."""
    return (_by_lanes(numbers, 4).contiguous().view(torch.uint8) ^ 128).view(torch.int8).view(numbers.shape)


def unpack_eight(packed: Int8[Tensor, "m n"], block: int) -> Int8[Tensor, "m n"]:
    """What `pack_eight` was given, on a machine where L was `block`."""
    m, n = packed.shape
    by_lanes = (packed.view(torch.uint8) ^ 128).view(torch.int8).view(m // block, n // 4, block, 4)
    return by_lanes.transpose(1, 2).reshape(m, n)


def _by_lanes(numbers: Tensor, together: int) -> Tensor:
    """(m / L, n / together, L, together)"""
    return numbers.unflatten(1, (-1, together)).unflatten(0, (-1, lanes())).transpose(1, 2)


class Product:
    """Rows at one place times a packed matrix, as often as it is called; the result goes to another place.

    Args:
        x: the rows, contiguous.
        weight: what `pack_four` or `pack_eight` gives.
        scales: with four bits, a scale and an offset, which stands for the number 8, of each group; else a scale of
            each row.
        out: contiguous.
    """

    def __init__(
        self,
        x: Float[Tensor, "rows n"],
        weight: UInt8[Tensor, "m half"] | Int8[Tensor, "m n"],
        scales: BFloat16[Tensor, "groups m 2"] | BFloat16[Tensor, " m"],
        out: Float[Tensor, "rows m"],
    ) -> None:
        rows, n = x.shape
        m, scales = out.shape[1], scales.contiguous()
        # What rows become: two bytes for each number, a step and a sum for each group; and lists of groups.
        room = rows * (2 * n + 8 * (n // GROUP) + 4 * (n // GROUP + 1))
        scratch = torch.empty(room, dtype=torch.int8, device="cpu")
        self._kept = x, weight, scales, out, scratch
        addresses = (tensor.data_ptr() for tensor in (weight, scales, x, scratch, out))
        how = int(scales.ndim == 3), int(scales.ndim == 3 and rows > FEW)
        self._record = array("q", load_kernels("few_bits").Record(0, 0, *addresses, rows, n, m, *how))
        self._address = self._record.buffer_info()[0]
        self._round, self._task, *_ = _tasks()
        self._team, self._rounding_team = rows * n * m >= _WORTH_A_TEAM, _SAME_AS * rows * n >= _WORTH_A_TEAM
        self._blocks = m // lanes()

    def __call__(self) -> None:
        """Multiply."""
        threads = torch.get_num_threads() if self._team else 1
        self._record[0], self._record[1] = 0, _portion(self._blocks, threads)
        run_on_team(self._round, self._address, threads if self._rounding_team else 1)
        self._record[0] = 0
        run_on_team(self._task, self._address, threads)


def _portion(blocks: int, threads: int) -> int:
    """Blocks of L outputs that a thread takes at a time."""
    return max(1, blocks // (8 * threads)) * 2 if threads > 1 else blocks


@cache
def _tasks() -> tuple[Any, ...]:
    kernels = load_kernels("few_bits")
    return tuple(map(task_of, (kernels.round_rows, kernels.multiply, kernels.unpack, kernels.gather)))


def _multiply(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    if len(x):
        Product(x.contiguous(), weight, scales, out)()
    return out


def _unpack(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    weight, scales, out = weight.contiguous(), scales.contiguous(), _empty_matrix(weight, scales, dtype)
    m, n = out.shape
    threads = torch.get_num_threads() if n * m >= _WORTH_A_TEAM else 1
    addresses = (tensor.data_ptr() for tensor in (weight, scales, out))
    kernels = load_kernels("few_bits")
    how = n, m, int(scales.ndim == 3), int(dtype == torch.bfloat16)
    record = array("q", kernels.Unpacking(0, _portion(m // lanes(), threads), *addresses, *how))
    run_on_team(_tasks()[2], record.buffer_info()[0], threads)
    return out


def _multiply_transposed(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    (rows, m), n = x.shape, weight.shape[1]
    weight, x = weight.contiguous(), (x.float() * scales.float()).contiguous()
    portions = -(-m // (lanes() * _SUMMED))
    sums = torch.zeros(portions, rows, n, lanes(), dtype=torch.float32, device="cpu")
    kernels = load_kernels("few_bits")
    addresses = (tensor.data_ptr() for tensor in (weight, x, sums))
    record = array("q", kernels.Gathering(0, _SUMMED, *addresses, rows, n, m))
    run_on_team(_tasks()[3], record.buffer_info()[0], torch.get_num_threads() if n * m >= _WORTH_A_TEAM else 1)
    return sums.sum((0, 3))


def _empty_matrix(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    m, length = weight.shape
    return weight.new_empty(m, length * (2 if scales.ndim == 3 else 1), dtype=dtype)


def _empty_gathered(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1], dtype=torch.float32)


def _empty_product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


# torch.library.custom_op would take longer than the product.
_library = torch.library.Library("fastweights", "FRAGMENT")
_library.define("few_bits(Tensor x, Tensor weight, Tensor scales) -> Tensor")
_library.impl("few_bits", _multiply, "CPU")
_library.impl("few_bits", _empty_product, "Meta")
_library.define("unpack_few_bits(Tensor weight, Tensor scales, ScalarType dtype) -> Tensor")
_library.impl("unpack_few_bits", _unpack, "CPU")
_library.impl("unpack_few_bits", _empty_matrix, "Meta")
_library.define("few_bits_transposed(Tensor x, Tensor weight, Tensor scales) -> Tensor")
_library.impl("few_bits_transposed", _multiply_transposed, "CPU")
_library.impl("few_bits_transposed", _empty_gathered, "Meta")
multiply = torch.ops.fastweights.few_bits.default
"""multiply(x, weight, scales): rows times a packed matrix, as in `Product`, (rows, m); it has no derivatives."""
unpack = torch.ops.fastweights.unpack_few_bits.default
"""unpack(weight, scales, dtype): a packed matrix in float32 or bf16, (m, n), for products with many rows."""
multiply_transposed = torch.ops.fastweights.few_bits_transposed.default
"""multiply_transposed(x, weight, scales): rows of float32 (rows, m) times the other side of a matrix of eight bits that
is packed, (rows, n) in float32; nothing is rounded, and it has no derivatives."""
