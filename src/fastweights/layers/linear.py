"""Matrix products as fast as the machine is.

On x86 torch leaves a float32 product to MKL, which on AMD's CPUs goes half as fast as it could, and reads a matrix with
one thread where there is one token to multiply it by. oneDNN, which torch carries for compiled models, is 1.5 to 3
times as fast there (`python -m benchmarks.decode` has softmax attention both ways).

Its product is an operator here, `torch.ops.fastweights.linear`, so that torch's FLOP counter and whatever else watches
operators sees one. It is given plain float32 tensors on a CPU; with everything else `linear` is torch's own.
`use_onednn` switches it on for a model, `set_onednn` off for a whole process.
"""

from __future__ import annotations

import logging
from functools import cache
from math import prod
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula
from transformers.pytorch_utils import Conv1D

from fastweights.errors import reason_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

logger = logging.getLogger("fastweights")

WORTH_ALL_THREADS = 300_000
"""Multiplications; one thread is done with fewer before others have woken up."""
WORTH_A_FUNCTION = 30_000_000
"""Multiplications, where gradients may be needed: fewer are done sooner by autograd itself."""
FEW, ROUND = 16, 32
_PLAIN = (torch.Tensor, nn.Parameter)
_on = True


def set_onednn(enabled: bool) -> None:
    """Switch oneDNN's products on or off everywhere in this process; off, all products are torch's own.

    They are on from the start, for what this library makes or loads and for models given to `use_onednn`.
    """
    global _on
    _on = enabled


def use_onednn(model: nn.Module, *, enabled: bool = True) -> None:
    """Let the linear layers of `model` take these products, or take torch's own again.

    Each nn.Linear and Conv1D gets a `forward` of its own and stays what it is otherwise: its class, its parameters and
    their names. One that has been given another `forward` before, as by accelerate's hooks, keeps that. Copies of the
    model take these products, too; what is pickled comes back with torch's own.
    """
    for module in model.modules():
        for name in ("forward", "_replicate_for_data_parallel"):
            if getattr(vars(module).get(name), "__func__", None) in FORWARDS:
                delattr(module, name)
        if enabled and type(module) in _FORWARD and "forward" not in vars(module):
            module.forward = MethodType(_FORWARD[type(module)], module)
            module._replicate_for_data_parallel = MethodType(_replicate_for_data_parallel, module)


def linear(
    x: Float[Tensor, "... n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "... m"]:
    """x weightᵀ + bias; by oneDNN if it is of plain float32 tensors on a CPU and not too small."""
    differentiated = is_differentiated()
    if not _is_for_onednn(x, weight, bias, differentiated):
        return nn.functional.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if differentiated else _product(x, weight, bias)


def linear_by_row(x: Float[Tensor, "B T n"], weight: Float[Tensor, "B m n"]) -> Float[Tensor, "B T m"]:
    """x weightᵀ for each row of a batch with a matrix of its own."""
    if len(x) > 0 and _is_for_onednn(x[0], weight[0], None, is_differentiated()):
        return torch.stack([linear(*row) for row in zip(x, weight, strict=True)])
    return x @ weight.mT


def is_differentiated() -> bool:
    """Whether gradients may be needed, backward or forward; the latter whatever torch.no_grad says."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def needs_derivatives(*inputs: Tensor) -> bool:
    """Whether what is made of these must know its derivatives, which some of torch's kernels do not have."""
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, differentiated: bool) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and _on
        # The most frequent reason first: in a small model, the others would take as long as what they save.
        and x.numel() * weight.shape[0] >= (WORTH_A_FUNCTION if differentiated else WORTH_ALL_THREADS)
        and not torch.jit.is_tracing()
        and _is_plain(x)
        and _is_plain(weight)
        and (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1]))
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and _onednn() is not None
    )


def _is_plain(tensor: Tensor) -> bool:
    """No subclass, which may hold anything; float32 numbers in a CPU's memory."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


@cache
def _onednn() -> Any:
    """The product, or None: it is an operator of torch's own compiler, which may change it or leave it out."""
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        product(torch.zeros(1, 1), torch.zeros(1, 1), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("this torch's oneDNN is not to be had (%s): matrix products are torch's own", reason_of(error))
        return None
    return product


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN, which compiles a kernel for each number of rows and keeps it; so it is given round numbers of them."""
    onednn = _onednn()
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # part of the columns, transposed, takes it a thousand times as long
    rows = prod(x.shape[:-1])
    if rows <= FEW or rows % ROUND == 0:
        return onednn(x, weight, bias, "none", [], "")
    padded = nn.functional.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, -rows % ROUND))
    return onednn(padded, weight, bias, "none", [], "")[:rows].unflatten(0, x.shape[:-1])


def _empty_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = torch.library.Library("fastweights", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", _multiply, "CPU")
_library.impl("linear", _empty_product, "Meta")  # register_fake does the same, and takes 50 ms of each import
_linear = torch.ops.fastweights.linear.default


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the operator where something watches operators.

    Elsewhere without it: it takes 5 µs, and a step of decoding has hundreds of products.
    """
    return (_linear if is_in_torch_dispatch_mode() else _multiply)(x, weight, bias)


@register_flop_formula(torch.ops.fastweights.linear)
def _flops(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * prod(x) * weight[0]


class _Product(torch.autograd.Function):
    """oneDNN's product with derivatives, which are such products again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

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


torch.library.register_autograd(
    "fastweights::linear", _Product.backward, setup_context=_Product.setup_context, lib=_library
)


class _Linear(nn.Linear):
    """Lends its forward to linear layers, which do not become of this class."""

    def forward(self, input: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return linear(input, self.weight, self.bias)


class _Conv1D(Conv1D):
    """The same for GPT-2's linear layer, whose matrix is stored transposed."""

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return linear(x, self.weight.t(), self.bias)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """DataParallel's copy has weights of its own, and a forward bound to the original's: it gets torch's."""
    replica = type(self)._replicate_for_data_parallel(self)
    use_onednn(replica, enabled=False)
    return replica


# A bound method is pickled by its name, so that one comes back as the class's own.
_FORWARD = {nn.Linear: _Linear.forward, Conv1D: _Conv1D.forward}
FORWARDS = {
    *_FORWARD.values(),
    *(cls.forward for cls in _FORWARD),
    _replicate_for_data_parallel,
    nn.Module._replicate_for_data_parallel,
}
"""All that `use_onednn` puts into a module, or that it finds there when a module is unpickled."""
