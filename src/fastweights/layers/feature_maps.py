"""Feature maps of queries and keys: what a rule is given in their place.

A map works on each head by itself, (B, T, H, D) -> (B, T, H, width). A layer has one for its queries and one for its
keys, of which there are fewer where heads share them; maps that learn have weights of their own for each head of
either, and one that is `positional` is told where each token stands. The paper's own map is the identity (H. H. Mao,
2022).

Notation: B batch, T time, H heads (of queries, or of keys), D width of a head, F rows of a learned matrix, K width
after the map.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastweights.errors import check_name
from fastweights.layers.precision import KeepsFloat32

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class FeatureMap(nn.Module):
    """The identity, and what every other map is.

    Args:
        head_dim: width D of a query or key.
        heads: of queries, or of keys.
    """

    non_negative = False
    """Whether nothing that comes out is below 0, so that weights q·k can be divided by their sum."""
    positional = False
    """Whether `forward` takes the tokens' positions, too."""
    learns_features = False
    """Whether it can be told how many features to learn."""

    def __init__(self, head_dim: int, heads: int) -> None:
        super().__init__()
        self.width = head_dim
        """Width of what comes out."""

    def reset_parameters(self) -> None:
        """Start as a new map."""

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        return x


class EluPlusOne(FeatureMap):
    """elu(x) + 1: positive, linear above 0 and exponential below.

    Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236). e^x is computed as it is: elu(x) = e^x - 1 would
    lose in bfloat16 what adding 1 is to bring back.
    """

    non_negative = True

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class Dpfp(FeatureMap):
    """Products of neighbours in r = relu([x, -x]): (r_i r_{i-1}, ..., r_i r_{i-ν}), most of which are 0.

    Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers" (arXiv 2102.11174), section 5.3. The width
    becomes 2νD.

    Args:
        head_dim: width D of a query or key.
        heads: of queries, or of keys.
    """

    non_negative = True
    nu = 1
    """ν, neighbours on one side."""

    def __init__(self, head_dim: int, heads: int) -> None:
        super().__init__(head_dim, heads)
        self.width = 2 * self.nu * head_dim

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        r = torch.cat((x, -x), -1).relu()
        return torch.cat([r * r.roll(j, -1) for j in range(1, self.nu + 1)], -1)


class Dpfp2(Dpfp):
    """The same with two neighbours, ν = 2."""

    nu = 2


class Dpfp3(Dpfp):
    """The same with three neighbours, ν = 3."""

    nu = 3


class CosFormer(FeatureMap):
    """[relu(x) cos θp, relu(x) sin θp] of the token at position p, with θ = π / 2M.

    Two tokens' weight is then relu(q)·relu(k) cos(θ (p - p')): cosFormer, Qin et al. (arXiv 2202.08791). The cosine
    falls from 1 for a token itself to 0 at a distance of M, beyond which weights turn negative: M is the longest text
    that the map is made for. The width becomes 2D.

    Args:
        head_dim: width D of a query or key.
        heads: of queries, or of keys.
        length: M.
    """

    positional = True

    def __init__(self, head_dim: int, heads: int, length: int = 2048) -> None:
        super().__init__(head_dim, heads)
        self.length, self.width = length, 2 * head_dim

    def forward(
        self, x: Float[Tensor, "B T H D"], positions: Int[Tensor, "_ T"] | None = None
    ) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head.

        Args:
            x: queries or keys.
            positions: of the tokens, from anywhere on: their differences alone matter. None for 0, 1, 2, ...
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        dtype = torch.promote_types(x.dtype, torch.float32)
        # A position is reduced to one period first: in float32 angles of long texts would lose their digits.
        angle = (positions % (4 * self.length)).to(dtype)[..., None, None] * (math.pi / (2 * self.length))
        r = x.relu().to(dtype)
        return torch.cat((r * angle.cos(), r * angle.sin()), -1).to(x.dtype)


class _Projected(KeepsFloat32, FeatureMap):
    """A map of W x with a learned matrix W for each head, which starts as the identity; in float32.

    Rows of W beyond those of the identity are those of random rotations, and so are all of one with fewer: the same for
    each head, as queries and keys are to agree at first.

    Args:
        head_dim: width D of a query or key.
        heads: of queries, or of keys.
        features: rows F of W; by default D.
    """

    non_negative = True
    starts_as_identity = True
    """Which is not 0, to which weight decay would draw it."""

    def __init__(self, head_dim: int, heads: int, features: int | None = None) -> None:
        super().__init__(head_dim, heads)
        self.width = features or head_dim
        self.weight = nn.Parameter(torch.empty(heads, self.width, head_dim, dtype=torch.float32))
        _Projected.reset_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start where x itself is what the map is of."""
        features, width = self.weight.shape[1:]
        rows = [torch.eye(width, device="cpu")] if features >= width else []
        random = torch.Generator().manual_seed(0)
        while len(rows) * width < features:
            rows.append(torch.linalg.qr(torch.randn(width, width, generator=random, device="cpu"))[0])
        self.weight.copy_(torch.cat(rows)[:features])

    def project(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H F"]:
        """W x in float32, whatever autocast says."""
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("bthd,hkd->bthk", x.to(self.weight.dtype), self.weight)


class Projection(_Projected):
    """W x, with W learned for each head.

    Queries and keys of the fast weights' own: beside a window, whose softmax goes on with the pretrained ones, each of
    the two can learn what it needs. Ours; W starts as the identity.

    Args:
        head_dim: width of a query or key.
        heads: of queries, or of keys.
    """

    non_negative = False

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        return self.project(x).to(x.dtype)


class ReluOfProjection(_Projected):
    """relu(W x + b), with W and b learned for each head.

    T2R: Kasai et al., "Finetuning Pretrained Transformers into RNNs" (arXiv 2103.13076). W starts as the identity and b
    at 0.

    Args:
        head_dim: width D of a query or key.
        heads: of queries, or of keys.
        features: rows of W, which are the width of what comes out; by default D.
    """

    learns_features = True

    def __init__(self, head_dim: int, heads: int, features: int | None = None) -> None:
        super().__init__(head_dim, heads, features)
        self.bias = nn.Parameter(torch.zeros(heads, self.width, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as relu(x)."""
        super().reset_parameters()
        self.bias.zero_()

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        return (self.project(x) + self.bias).relu().to(x.dtype)


class SoftmaxOfProjection(_Projected):
    """[softmax(W x), softmax(-W x)] over the channels of a head, with W learned for each head.

    Hedgehog: Zhang et al., "The Hedgehog & the Porcupine" (arXiv 2402.04347), whose W starts as the identity, too.

    Args:
        head_dim: width D of a query or key.
        heads: of queries, or of keys.
        features: rows of W, of which what comes out has twice as many; by default D.
    """

    learns_features = True

    def __init__(self, head_dim: int, heads: int, features: int | None = None) -> None:
        super().__init__(head_dim, heads, features)
        self.width *= 2

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """Queries or keys, head by head."""
        x, dtype = self.project(x), x.dtype
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1).to(dtype)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "identity": FeatureMap,
    "linear": Projection,
    "elu+1": EluPlusOne,
    "relu": ReluOfProjection,
    "dpfp": Dpfp,
    "dpfp-2": Dpfp2,
    "dpfp-3": Dpfp3,
    "cosformer": CosFormer,
    "softmax": SoftmaxOfProjection,
}


def make_feature_map(
    name: str, head_dim: int, heads: int, length: int | None = None, features: int | None = None
) -> FeatureMap:
    """The map of that name.

    Args:
        name: one of FEATURE_MAPS.
        head_dim: width of a query or key.
        heads: of queries, or of keys.
        length: of the longest text, for a positional map; by default its own.
        features: that a map learns which can be told how many; by default D.

    Raises:
        FastWeightsError: if there is none; it names those that there are.
    """
    check_name("feature_map", name, FEATURE_MAPS)
    kind, settings = FEATURE_MAPS[name], {}
    if kind.positional and length is not None:
        settings["length"] = length
    if kind.learns_features:
        settings["features"] = features
    return kind(head_dim, heads, **settings)
