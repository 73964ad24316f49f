"""Parameters that stay in float32 whatever a model is cast to: decays close to 1, and sums over long texts, need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastweights.layers.linear import linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_SHORT = (torch.bfloat16, torch.float16)


class KeepsFloat32(nn.Module):
    """A module whose own parameters, not its children's, move with `.to(...)` and are never cast below float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(lambda x: uncast(x, fn(x)), recurse=False)


def uncast(before: Tensor, after: Tensor) -> Tensor:
    """`after`, or where that has fewer digits, `before` on its device."""
    return before.to(after.device) if after.dtype in _SHORT and before.dtype not in _SHORT else after


class Float32Linear(KeepsFloat32, NonDynamicallyQuantizableLinear):
    """nn.Linear in float32, whatever it is given and whatever autocast says; quantisers leave it as it is.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether it has one.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) of any dtype -> (..., out_features) in the dtype of the weights."""
        with torch.autocast(input.device.type, enabled=False):
            return linear(input.to(_dtype_of(self)), self.weight, self.bias)


def _dtype_of(linear: nn.Linear) -> torch.dtype:
    dtype = linear.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32  # quantised weights take float32
