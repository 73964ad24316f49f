"""MixGate: how much each head says of its fast weights, token by token, and how much less of its window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastweights.layers.precision import Float32Linear, KeepsFloat32

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class MixGate(KeepsFloat32):
    """g_t = 2 sigmoid(W x_t + b), one number a head: fast weights count g_t times, a window 1 - s g_t times.

    A softmax over all tokens gives what lies behind the window a weight p, another one for each token, and what is in
    it 1 - p times what the window's own softmax does. Without this gate both count alike at each token. It starts as if
    it were not there: W and b at 0, where g_t is 1, and s, one a head, at 0. Ours; a gate on what is read, a number for
    each channel, is in S. Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv
    2312.06635).

    Args:
        hidden_size: width of the layer's input x.
        heads: H.
        window: whether there is one, and so an s.
    """

    def __init__(self, hidden_size: int, heads: int, *, window: bool) -> None:
        super().__init__()
        self.gate = Float32Linear(hidden_size, heads)
        self.share = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if window else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As if it were not there."""
        self.gate.weight.zero_()
        self.gate.bias.zero_()
        if self.share is not None:
            self.share.zero_()

    def forward(self, x: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"] | None]:
        """How often the fast weights count, and the window (None without one), in float32 at least."""
        g = 2 * self.gate(x).sigmoid()
        return g, None if self.share is None else 1 - self.share * g
