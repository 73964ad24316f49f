"""Matrix products for a few tokens at a time, which is what generating is made of.

Such a product costs what reading its matrix costs. On x86 torch leaves it to MKL, which reads a float32 matrix with one
thread for one token. oneDNN, which torch carries for compiled models, reads it with all threads: two to three times
faster on AMD's CPUs (`python -m benchmarks.decode` has softmax attention both ways).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FEW_TOKENS = 16
WORTH_ALL_THREADS = 300_000
"""Numbers in a matrix; one thread has read a smaller one before the others have woken up."""
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(
    x: Float[Tensor, "... n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "... m"]:
    """x weightᵀ + bias; by oneDNN for at most 16 tokens and a big matrix, in float32, on a CPU, without gradients."""
    if not torch.compiler.is_compiling() and _is_for_onednn(x, weight):
        return _PRODUCT(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _PRODUCT is not None
        and weight.numel() >= WORTH_ALL_THREADS
        and 0 < prod(x.shape[:-1]) <= FEW_TOKENS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


class FewTokensLinear(nn.Linear):
    """nn.Linear with this module's product."""

    def forward(self, input: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return linear(input, self.weight, self.bias)


class FewTokensConv1D(Conv1D):
    """GPT-2's linear layer, whose matrix is stored transposed, with this module's product."""

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        if not torch.compiler.is_compiling() and _is_for_onednn(x, self.weight):
            return linear(x, self.weight.t(), self.bias)
        return super().forward(x)


_FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FewTokensLinear, Conv1D: FewTokensConv1D}


def speed_up_few_tokens(model: nn.Module) -> None:
    """Let the linear layers of `model` take these products; parameters and their names stay as they are."""
    for module in model.modules():
        if type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]
