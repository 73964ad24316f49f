"""Feature maps of queries and keys: what a rule is given in their place.

A map works on each head by itself, (..., D) -> (..., width(D)). The paper's own is the identity (H. H. Mao, 2022).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastweights.errors import check_name

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class FeatureMap(nn.Module):
    """The identity, and what every other map is.

    Args:
        head_dim: width D of a query or key.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.width = head_dim
        """Width of what comes out."""

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        return x


class EluPlusOne(FeatureMap):
    """elu(x) + 1: positive, linear above 0 and exponential below.

    Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236). e^x is computed as it is: elu(x) = e^x - 1 would
    lose in bfloat16 what adding 1 is to bring back.
    """

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


FEATURE_MAPS: dict[str, type[FeatureMap]] = {"identity": FeatureMap, "elu+1": EluPlusOne}


def make_feature_map(name: str, head_dim: int) -> FeatureMap:
    """The map of that name.

    Raises:
        FastWeightsError: if there is none; it names those that there are.
    """
    check_name("feature_map", name, FEATURE_MAPS)
    return FEATURE_MAPS[name](head_dim)
