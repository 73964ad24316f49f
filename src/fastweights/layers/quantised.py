"""Linear layers whose matrix is kept in few bits, for decoding, whose time is that of reading matrices from memory.

    bf16   as it is, rounded to 8 binary digits
    int8   whole numbers of 8 bits, and a scale for each row
    int4   of 4 bits, and a scale and an offset for each group of 32 numbers of a row: llama.cpp's Q4_1

A few tokens are multiplied by the kernels of `ops/few_bits`, where the machine has AVX2, in float32 but for a rounding
to fifteen bits; elsewhere by torch's, in bf16 with sums in float32. Many are multiplied by the matrix unpacked to bf16,
or to float32 where the machine has no products of bf16; there those of four bits take their kernel at any number, which
rounds some of many tokens' numbers to eight bits.
torchao has torch's kernel for int8, behind a class of tensors that takes longer to find it than the product does, and
for int4 on a CPU a prototype alone (docs/log.md).

Notation: n inputs, m outputs, g numbers in a group.
"""

from __future__ import annotations

import weakref
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fastweights.errors import FastWeightsError, check_name
from fastweights.layers.linear import linear as linear_of_float32
from fastweights.layers.linear import needs_derivatives
from fastweights.ops import few_bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import BFloat16, Float, Int8, UInt8
    from torch import Tensor

GROUP = 32
FEW = few_bits.FEW
"""Tokens up to which the kernels for few bits are the faster ones (measured on Zen 5, docs/log.md)."""
_COLUMNS = 32
_ROWS = 16
"""torch packs matrices of four bits whose rows are a multiple of this."""


class QuantisedLinear(nn.Module):
    """A linear layer for inference; a subclass says how its matrix is kept. Gradients reach its input, not its matrix.

    Args:
        in_features: n.
        out_features: m.
        bias: whether it has one, kept in float32.
    """

    bias: Float[Tensor, " m"] | None
    is_integer = True
    """Whether it keeps whole numbers, with scales."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @property
    def _block(self) -> int:
        """Rows that packed numbers mix; 0 while they are as they are saved.

        It is the tensor's, as others may put what is saved in its place, such as accelerate's offload; or the same
        memory without what the tensor knows, such as `torch.func.functional_call` of a detached one.
        """
        if not self.is_integer:
            return 0
        weight: Any = self._buffers["weight"]
        rows = getattr(weight, "_rows_packed", None)
        if rows is not None:
            return rows
        own = self.__dict__.get("_packed", lambda: None)()
        return own._rows_packed if own is not None and own.data_ptr() == weight.data_ptr() else 0

    @_block.setter
    def _block(self, rows: int) -> None:
        weight: Any = self._buffers["weight"]
        weight._rows_packed = rows
        self.__dict__["_packed"] = weakref.ref(weight)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear | Conv1D) -> QuantisedLinear:
        """A layer's matrix and bias, kept so."""
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        with torch.device(weight.device):
            made = cls(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        made.keep(weight.detach().float().contiguous())
        if layer.bias is not None:
            made.bias = layer.bias.detach().float()
        return made

    def keep(self, weight: Float[Tensor, "m n"]) -> None:
        """Take this matrix, rounded."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "m n"]:
        """What is kept of it, in bf16 or float32."""
        if self._is_for_us() and self.weight.is_cpu:
            return few_bits.unpack(self.weight, self.scales, dtype)  # type: ignore[arg-type]
        return self._matrix().to(dtype)

    def whole(self, *, keep: bool = False) -> nn.Linear:
        """A plain layer of what is kept, in float32; it learns nothing.

        Args:
            keep: it, for the next time.
        """
        kept: tuple[Tensor, nn.Linear] | None = self.__dict__.get("_whole")
        if kept is not None and kept[0] is self.weight:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():  # of use later, too
            made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
            made.weight = nn.Parameter(self.matrix(torch.float32), requires_grad=False)
            if self.bias is not None:
                made.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        if keep:
            self.__dict__["_whole"] = self.weight, made
        return made

    def _matrix(self) -> Float[Tensor, "m n"]:
        """What is kept of it, by torch alone."""
        raise NotImplementedError

    def few(self, x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows m"]:
        """The product with few rows of float32, in float32."""
        if self._is_for_us():
            return few_bits.multiply(x, self.weight, self.scales)  # type: ignore[arg-type]
        return self._few_of_bf16(x.to(torch.bfloat16)).float()

    def product(self, x: Float[Tensor, "rows n"], out: Float[Tensor, "rows m"]) -> Callable[[], object]:
        """What puts the product with the few rows at one place into another, as often as it is called."""
        if self._is_for_us():
            return few_bits.Product(x, self.weight, self.scales, out)  # type: ignore[arg-type]
        return lambda: out.copy_(self.few(x))

    def _is_for_us(self) -> bool:
        """Whether its numbers are in the order of `ops/few_bits`, as this machine has it."""
        return self._block > 0 and self._block == few_bits.lanes()

    def _takes_any_number(self) -> bool:
        """Whether the kernel for few tokens is as fast as any other at many."""
        return False

    def _few_of_bf16(self, x: BFloat16[Tensor, "rows n"]) -> BFloat16[Tensor, "rows m"]:
        return linear(x, self.matrix())

    def pack(self) -> None:
        """Put what is kept in the order of this machine's kernel, if it has one."""

    def _plain(self) -> Tensor:
        """The numbers that are kept, one by one."""
        return self.weight  # type: ignore[return-value]

    def _as_saved(self) -> Tensor:
        """These as a file has them."""
        return self._plain()

    @classmethod
    @torch.no_grad()
    def join(cls, layers: list[QuantisedLinear]) -> QuantisedLinear | None:
        """One layer that makes what several make of the same input, one after another.

        It has their matrices in one place, of which each of them keeps its part; None if these are not of one kind.
        """
        if any(type(layer) is not cls or layer.bias is not None or not layer._can_be_joined() for layer in layers):
            return None
        if len({layer._block for layer in layers}) > 1:
            return None
        block, made = layers[0]._block, cls.__new__(cls)
        made.__dict__.update(layers[0].__dict__)
        made._buffers = dict(layers[0]._buffers)
        made.out_features = sum(layer.out_features for layer in layers)
        for name, axis in (("weight", 0), ("scales", cls._axis)):
            if name not in made._buffers:
                continue
            parts: list[Any] = [layer._buffers[name] for layer in layers]
            whole = _where_they_are(parts, axis)
            if whole is None:
                whole, first = torch.cat(parts, axis), 0
                for layer, part in zip(layers, parts, strict=True):
                    own: Any = whole.narrow(axis, first, part.shape[axis])
                    if name == "weight":
                        own._rows_packed = block  # before another thread can see it
                    layer._buffers[name] = own
                    first += part.shape[axis]
            made._buffers[name] = whole
        for layer in (made, *layers):
            layer._block = block
        return made

    _axis = 0
    """Of its outputs, among the dimensions of its scales."""

    def _can_be_joined(self) -> bool:
        return self._block == 0 or self.out_features % self._block == 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Moves with `.to(...)` and is never cast."""
        block = self._block
        self.__dict__.pop("_whole", None)
        super()._apply(lambda x: moved if (moved := fn(x)).dtype == x.dtype else x.to(moved.device), recurse)
        self._block = block
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_whole", "_packed")}
        return kept | {"_rows": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tensors that were sent to another process know nothing of their order."""
        rows = state.pop("_rows", 0)
        super().__setstate__(state)
        if rows:
            self._block = rows

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        """In one order on all machines; and of a part of what was joined, its own memory: files hold no views."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._block:
            destination[f"{prefix}weight"] = self._as_saved()
        for name in ("weight", "scales"):
            x = destination.get(f"{prefix}{name}")
            if x is not None and x.untyped_storage().nbytes() != x.nbytes:
                destination[f"{prefix}{name}"] = x.clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.__dict__.pop("_whole", None)
        if self._block:  # what is loaded is as it is saved, and takes the place of what is packed
            self.weight, self._block = torch.empty_like(self._as_saved()), 0
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()

    def forward(self, input: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """In the dtype of the input."""
        if self.is_integer and torch.compiler.is_exporting():
            raise FastWeightsError(
                "matrices of int8 and int4 are in the order of this machine's kernels, and cannot be exported: export "
                "the model in fp32 or bf16"
            )
        rows = prod(input.shape[:-1])
        if input.is_cpu and (rows <= FEW or self._takes_any_number()) and not needs_derivatives(input):
            x = input.reshape(rows, self.in_features).float()
            y = self.few(x).to(input.dtype).view(*input.shape[:-1], self.out_features)
        elif input.is_cpu and not has_bf16_products():
            y = linear_of_float32(input.float(), self.matrix(torch.float32)).to(input.dtype)
        else:
            y = linear(input.to(torch.bfloat16), self.matrix()).to(input.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class BFloat16Linear(QuantisedLinear):
    """Of bf16 numbers, beside a model whose other parts are in float32."""

    weight: Float[Tensor, "m n"]
    is_integer = False

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.bfloat16))

    def keep(self, weight: Float[Tensor, "m n"]) -> None:
        """Take this matrix, rounded."""
        self.weight = weight.to(torch.bfloat16)

    def _matrix(self) -> Float[Tensor, "m n"]:
        return self.weight


class Int8Linear(QuantisedLinear):
    """Of eight bits, with a scale for each row.

    `weight` has the rows as they are saved; `pack` puts them in the order that this machine's kernel reads, and what
    `state_dict` gives is the former.
    """

    weight: Int8[Tensor, "m n"]
    scales: BFloat16[Tensor, " m"]

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.bfloat16))

    def keep(self, weight: Float[Tensor, "m n"]) -> None:
        """Take this matrix, rounded."""
        self.scales = _not_zero(weight.abs().amax(1) / 127)
        self.weight = (weight / self.scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self._block = 0
        self.pack()

    def pack(self) -> None:
        """Put the numbers in the order of this machine's kernel, if it has one for this size."""
        if self._block == 0 and self.weight.is_cpu and few_bits.takes(self.in_features, self.out_features):
            self.weight, self._block = few_bits.pack_eight(self.weight), few_bits.lanes()

    def _plain(self) -> Int8[Tensor, "m n"]:
        return few_bits.unpack_eight(self.weight, self._block) if self._block else self.weight

    def _matrix(self) -> Float[Tensor, "m n"]:
        return self._plain().float() * self.scales.float()[:, None]

    @property
    def goes_both_ways(self) -> bool:
        """Whether there is a kernel here for `few_transposed`."""
        return self._is_for_us() and self.weight.is_cpu

    def few_transposed(self, x: Float[Tensor, "rows m"]) -> Float[Tensor, "rows n"]:
        """The product of few rows with the transposed matrix, in float32; where it `goes_both_ways`."""
        return few_bits.multiply_transposed(x, self.weight, self.scales)

    def _few_of_bf16(self, x: BFloat16[Tensor, "rows n"]) -> BFloat16[Tensor, "rows m"]:
        """By torch's kernel, which reads beyond the end of rows of another length."""
        if self._block or self.in_features % _COLUMNS:
            return super()._few_of_bf16(x)
        return torch._weight_int8pack_mm(x, self.weight, self.scales)


class Int4Linear(QuantisedLinear):
    """Of four bits, with a scale and an offset for each group.

    `weight` has two numbers in a byte, those of a row one after another, as it is saved; `pack` puts them in the order
    that this machine's kernel reads, and what `state_dict` gives is the former.
    """

    weight: UInt8[Tensor, "m half"]
    scales: Float[Tensor, "groups m 2"]
    """And the offset, which stands for the code 8."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("weight", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(in_features // GROUP, out_features, 2, dtype=torch.bfloat16))

    @staticmethod
    def takes(in_features: int, out_features: int) -> bool:
        """Whether a matrix of this size can be kept so."""
        return in_features % GROUP == 0 and out_features % _ROWS == 0

    def keep(self, weight: Float[Tensor, "m n"]) -> None:
        """Take this matrix, rounded."""
        groups = weight.unflatten(1, (-1, GROUP))
        least, most = groups.aminmax(dim=-1)
        scale = _not_zero((most - least) / 15)
        offset = (least + 8 * scale.float()).to(torch.bfloat16)
        codes = (groups - offset.float()[..., None]) / scale.float()[..., None]
        codes = (codes.round() + 8).clamp(0, 15).to(torch.uint8).flatten(1)
        self.weight, self._block = _bytes(codes), 0
        self.scales = torch.stack((scale, offset), -1).transpose(0, 1).contiguous()
        self.pack()

    def pack(self) -> None:
        """Put the codes in the order of this machine's kernel, or of torch's if it has one whose order is known."""
        if self._block or not self.weight.is_cpu:
            return
        if few_bits.takes(self.in_features, self.out_features):
            self.weight, self._block = few_bits.pack_four(_nibbles(self.weight)), few_bits.lanes()
        elif self.out_features % _ROWS == 0 and (block := _packed_rows()):
            self.weight, self._block = _pack(_nibbles(self.weight)), block

    def _plain(self) -> UInt8[Tensor, "m n"]:
        if self._block in few_bits.LANES:
            return few_bits.unpack_four(self.weight, self._block)
        return _unpack(self.weight, self._block) if self._block else _nibbles(self.weight)

    def _as_saved(self) -> UInt8[Tensor, "m half"]:
        return _bytes(self._plain())

    def _matrix(self) -> Float[Tensor, "m n"]:
        scale, offset = self.scales.float().permute(2, 1, 0)[..., None]
        numbers = self._plain().unflatten(1, (-1, GROUP)).float() - 8
        return (numbers * scale + offset).flatten(1)

    def _takes_any_number(self) -> bool:
        return self._is_for_us() and not has_bf16_products()  # measured on Zen 3, docs/log.md

    def _few_of_bf16(self, x: BFloat16[Tensor, "rows n"]) -> BFloat16[Tensor, "rows m"]:
        """By torch's kernel, where it has one."""
        if not self._block or self._block != _packed_rows():
            return super()._few_of_bf16(x)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return multiply(x, self.weight, GROUP, self.scales.contiguous())

    _axis = 1

    def _can_be_joined(self) -> bool:
        return self._block > 0 and super()._can_be_joined()


LINEAR: dict[str, type[QuantisedLinear]] = {"bf16": BFloat16Linear, "int8": Int8Linear, "int4": Int4Linear}


def kept_as(weights: str, in_features: int, out_features: int, *, eight: bool) -> type[QuantisedLinear]:
    """How a matrix is kept: some, and those of an odd size, in eight bits where others have four.

    Args:
        weights: "bf16", "int8" or "int4".
        in_features: of the matrix.
        out_features: likewise.
        eight: whether four bits are too few for it, as for the unembedding.
    """
    check_name("weights", weights, LINEAR)
    if weights == "int4" and (eight or not Int4Linear.takes(in_features, out_features)):
        return Int8Linear
    return LINEAR[weights]


@cache
def has_bf16_products() -> bool:
    """Whether this CPU multiplies matrices of bf16 faster than it turns them into float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _where_they_are(parts: list[Tensor], axis: int) -> Tensor | None:
    """What was joined before, which these are all of; None if they are not."""
    storages = {part.untyped_storage().data_ptr() for part in parts}
    offsets = [part.storage_offset() for part in parts]
    whole = parts[0].untyped_storage()
    if len(storages) > 1 or whole.nbytes() != sum(part.nbytes for part in parts) or offsets != sorted(set(offsets)):
        return None
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return parts[0].as_strided(shape, torch.empty(shape, device="meta").stride(), 0)


def _not_zero(scale: Tensor) -> Tensor:
    """In bf16, and not 0 where all numbers are alike."""
    return scale.clamp(min=1e-12).to(torch.bfloat16)


def _bytes(numbers: UInt8[Tensor, "m n"]) -> UInt8[Tensor, "m half"]:
    """Two numbers in each, the first in the lower bits."""
    return numbers[:, ::2] | numbers[:, 1::2] << 4


def _nibbles(codes: UInt8[Tensor, "m half"]) -> UInt8[Tensor, "m n"]:
    """The numbers of `_bytes`, one by one."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def _pack(numbers: UInt8[Tensor, "m n"]) -> UInt8[Tensor, "m half"]:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.to(torch.int32), 1)


def _unpack(packed: UInt8[Tensor, "m half"], block: int) -> UInt8[Tensor, "m n"]:
    """Blocks of rows are column by column, the lower half's in the lower bits; of fewer rows, neighbours are pairs."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    whole = rows // block * block
    first, rest = packed.flatten().split((whole * columns // 2, (rows - whole) * columns // 2))
    blocks = first.view(-1, columns, block // 2)
    blocks = torch.stack((blocks & 15, blocks >> 4), 2).permute(0, 2, 3, 1).reshape(whole, columns)
    if whole == rows:
        return blocks
    rest = rest.view(columns, -1)
    return torch.cat((blocks, torch.stack((rest & 15, rest >> 4), -1).flatten(1).T))


@cache
def _packed_rows() -> int:
    """Rows that torch packs together, which depends on the CPU; 0 where it has another order, or no such kernel."""
    numbers = (torch.arange(80 * GROUP) % 97 % 16).to(torch.uint8).view(80, GROUP)
    try:
        packed = _pack(numbers)
    except (AttributeError, RuntimeError):
        return 0
    return next((block for block in (64, 32) if _unpack(packed, block).equal(numbers)), 0)
