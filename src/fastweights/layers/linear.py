"""Matrix products as fast as the machine is.

On x86 torch leaves a float32 product to MKL, which on AMD's CPUs goes half as fast as it could, and reads a matrix with
one thread where there is one token to multiply it by. oneDNN, which torch carries for compiled models, is 1.5 to 3
times as fast there (`python -m benchmarks.decode` has softmax attention both ways).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

WORTH_ALL_THREADS = 300_000
"""Multiplications; one thread is done with fewer before others have woken up."""
WORTH_A_FUNCTION = 30_000_000
"""Multiplications, where gradients may be needed: fewer are done sooner by autograd itself."""
FEW, ROUND = 16, 32
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(
    x: Float[Tensor, "... n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "... m"]:
    """x weightᵀ + bias; by oneDNN if it is of float32 numbers on a CPU and not too small."""
    if not _is_for_onednn(x, weight):
        return nn.functional.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _multiply(x, weight, bias)


def linear_by_row(x: Float[Tensor, "B T n"], weight: Float[Tensor, "B m n"]) -> Float[Tensor, "B T m"]:
    """x weightᵀ for each row of a batch with a matrix of its own."""
    if len(x) > 0 and _is_for_onednn(x[0], weight[0]):
        return torch.stack([linear(*row) for row in zip(x, weight, strict=True)])
    return x @ weight.mT


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN, which compiles a kernel for each number of rows and keeps it; so it is given round numbers of them."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # part of the columns, transposed, takes it a thousand times as long
    rows = prod(x.shape[:-1])
    if rows <= FEW or rows % ROUND == 0:
        return _onednn(x, weight, bias, "none", [], "")
    padded = nn.functional.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, -rows % ROUND))
    return _onednn(padded, weight, bias, "none", [], "")[:rows].unflatten(0, x.shape[:-1])


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _onednn is not None
        and torch.backends.mkldnn.enabled
        and prod(x.shape[:-1]) * weight.numel() >= (WORTH_A_FUNCTION if torch.is_grad_enabled() else WORTH_ALL_THREADS)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


class _Product(torch.autograd.Function):
    """oneDNN's product with derivatives, which are such products again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx, do: Tensor):
        x, weight = ctx.saved_tensors
        rows = do.reshape(-1, do.shape[-1])
        dx = linear(do, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None

    @staticmethod
    def jvp(ctx, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None):
        x, weight = ctx.saved_tensors
        parts = [] if dx is None else [linear(dx, weight)]
        parts += [] if dweight is None else [linear(x, dweight)]
        parts += [] if dbias is None else [dbias.expand(*x.shape[:-1], -1)]
        return sum(parts[1:], parts[0])


class OneDNNLinear(nn.Linear):
    """nn.Linear with this module's product."""

    def forward(self, input: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return linear(input, self.weight, self.bias)


class OneDNNConv1D(Conv1D):
    """GPT-2's linear layer, whose matrix is stored transposed, with this module's product."""

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return linear(x, self.weight.t(), self.bias)


_FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: OneDNNLinear, Conv1D: OneDNNConv1D}


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` take these products; its parameters and their names stay as they are.

    (What looks for nn.Linear itself and for no subclass, such as torch's old `quantize_dynamic`, overlooks them.)
    """
    for module in model.modules():
        if type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]
