"""Matrix products while reading and generating.

On x86 torch leaves a float32 product to MKL, which on AMD's CPUs goes half as fast as it could, and reads a matrix with
one thread where there is one token to multiply it by. oneDNN, which torch carries for compiled models, goes as fast as
the machine: 1.5 to 3 times as fast there (`python -m benchmarks.decode` has softmax attention both ways).
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
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(
    x: Float[Tensor, "... n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "... m"]:
    """x weightᵀ + bias; by oneDNN if it is of float32 numbers on a CPU, needs no gradients and is not too small."""
    if not torch.compiler.is_compiling() and _is_for_onednn(x, weight):
        return _onednn(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return bool(
        _onednn is not None
        and torch.backends.mkldnn.enabled
        and prod(x.shape[:-1]) * weight.numel() >= WORTH_ALL_THREADS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


class InferenceLinear(nn.Linear):
    """nn.Linear with this module's product."""

    def forward(self, input: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return linear(input, self.weight, self.bias)


class InferenceConv1D(Conv1D):
    """GPT-2's linear layer, whose matrix is stored transposed, with this module's product."""

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        if not torch.compiler.is_compiling() and _is_for_onednn(x, self.weight):
            return linear(x, self.weight.t(), self.bias)
        return super().forward(x)


_FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: InferenceLinear, Conv1D: InferenceConv1D}


def speed_up_inference(model: nn.Module) -> None:
    """Let the linear layers of `model` take these products; its parameters and their names stay as they are."""
    for module in model.modules():
        if type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]
