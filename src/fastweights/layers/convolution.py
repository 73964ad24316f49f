"""ShortConvolution: each query, key and value is made of the last few tokens' and not of its own token's alone.

Notation: B batch, T time, C channels, n tokens that the convolution sees, its own included, N = n - 1 before it,
L = N + T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastweights.layers.precision import KeepsFloat32
from fastweights.layers.rules import TokenMarks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class ShortConvolution(KeepsFloat32):
    """y_t = Σ_j w_j ⊙ x_{t-n+1+j} for j from 0 to n - 1: causal, each channel by itself, in float32.

    Tokens before a document's first count as 0, and padding as if it were not there. Weights start where y is x. S.
    Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), have one of four tokens
    behind each projection, with an activation that pretrained projections do not know and this has not.

    Args:
        channels: C.
        size: n, of 2 up.
    """

    starts_as_identity = True
    """Which is not 0, to which weight decay would draw it."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size, dtype=torch.float32))
        """(C, n), the token's own last."""
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the identity."""
        self.weight.zero_()
        self.weight[:, -1] = 1.0

    def forward(
        self, x: Float[Tensor, "B T C"], tail: Float[Tensor, "B C N"] | None = None, marks: TokenMarks | None = None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C N"]]:
        """Of each token, and what the tokens to come will need.

        Args:
            x: of the tokens.
            tail: what was returned for the tokens before; None before the first.
            marks: padding, for which there is no meaning in what is returned, and borders of documents.

        Returns:
            y in the dtype of x, and the last n - 1 tokens' x of each row's document, in float32 at least, 0 where it
            has not read as many.
        """
        real, starts = TokenMarks() if marks is None else marks
        room, dtype = self.weight.shape[1] - 1, x.dtype
        x = x.to(torch.promote_types(dtype, self.weight.dtype))
        before = x.new_zeros(len(x), room, x.shape[2]) if tail is None else tail.mT.to(x.dtype)
        places = None
        if real is not None:  # real tokens first, in their order
            places = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            x = _in_order(x, places)
        seen = torch.cat((before, x), 1)
        documents = None
        if starts is not None:
            documents = starts.long().cumsum(1).expand(len(x), -1)
            documents = documents if places is None else documents.gather(1, places)
            documents = torch.cat((documents.new_zeros(len(documents), room), documents), 1)
        y = self._convolve(seen, documents).to(dtype)
        if places is not None:
            y = _in_order(y, places.argsort(1))
        return y, _last(seen, documents, real, room)

    def _convolve(self, seen: Float[Tensor, "B L C"], documents: Int[Tensor, "B L"] | None) -> Float[Tensor, "B T C"]:
        weight = self.weight
        room, tokens = weight.shape[1] - 1, seen.shape[1] - weight.shape[1] + 1
        with torch.autocast(seen.device.type, enabled=False):
            y = seen[:, room:] * weight[:, room]
            for j in range(room):
                past = seen[:, j : j + tokens]
                if documents is not None:
                    past = past.masked_fill((documents[:, j : j + tokens] != documents[:, room:])[..., None], 0)
                y = torch.addcmul(y, past, weight[:, j])
            return y


def _in_order(x: Float[Tensor, "B L C"], places: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _last(
    seen: Float[Tensor, "B L C"], documents: Int[Tensor, "B L"] | None, real: Bool[Tensor, "B T"] | None, room: int
) -> Float[Tensor, "B C N"]:
    """A tensor of its own, as a view would keep all of `seen`."""
    if real is None and documents is None:
        return seen[:, -room:].mT.clone(memory_format=torch.contiguous_format)
    tokens = seen.shape[1] - room
    read = torch.full((len(seen), 1), tokens, device=seen.device) if real is None else real.sum(1, keepdim=True)
    places = read + torch.arange(room, device=seen.device)
    last = _in_order(seen, places)
    if documents is not None:
        # The current one is that of the last real token, or the one before all of these.
        current = documents.gather(1, read + room - 1)
        last = last.masked_fill((documents.gather(1, places) != current)[..., None], 0)
    return last.mT.contiguous()
