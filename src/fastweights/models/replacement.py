"""Fast weights in the place of a base model's attention, and of its absolute positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastweights.layers.attention import AttentionShape, FastWeightAttention
from fastweights.layers.convolution import ShortConvolution
from fastweights.layers.feature_maps import Projection, make_feature_map
from fastweights.layers.mix_gate import MixGate
from fastweights.layers.rules import RuleShape, make_rule
from fastweights.models.architectures import architecture_of, has_rotary, position_vectors
from fastweights.models.documents import can_be_read

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.models.architectures import Architecture
    from fastweights.models.configuration import FastWeightsConfig


def replace_attention(base: PreTrainedModel, config: FastWeightsConfig) -> None:
    """Put fast weights where the settings ask for them.

    Args:
        base: the headless base model.
        config: of the model around it.
    """
    row, settings = architecture_of(config.base), config.settings
    shape = AttentionShape(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    length: int | None = getattr(config.base, "max_position_embeddings", None)
    for i, layer in enumerate(base.get_submodule(row.layers)):  # type: ignore[arg-type]
        if config.layer_types[i] == "full_attention":
            continue
        query_map, key_map = (
            make_feature_map(settings.feature_map, shape.head_dim, heads, length, settings.feature_dim)
            for heads in (shape.heads, shape.kv_heads)
        )
        rule_shape = RuleShape(
            hidden_size=shape.hidden_size,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            key_width=key_map.width,
            value_width=shape.head_dim,
            value_gate=settings.value_gate,
            gate_bias=settings.gate_bias,
            gate_rank=settings.gate_rank,
            write_bias=settings.write_bias,
            features=settings.feature_dim,
            normaliser=bool(settings.normaliser),
        )
        attention = FastWeightAttention(
            layer.get_submodule(row.attention),
            row.projections,
            make_rule(settings.rule, rule_shape),
            query_map,
            key_map,
            Projection(shape.head_dim, shape.kv_heads) if settings.value_map else None,
            None if config.convolution_shape is None else ShortConvolution(*config.convolution_shape),
            MixGate(shape.hidden_size, shape.heads, window=config.windows[i] > 0) if settings.mix_gate else None,
            shape=shape,
            layer_idx=i,
            window=config.windows[i],
            sinks=config.sinks if config.windows[i] else 0,
            write=settings.write or "all",
            # Models that have lost their absolute positions learn to tell near from far in the window anew.
            window_bias=settings.positions == "drop" and row.positions is not None,
            eight_bits=config.windows_in_eight_bits,
            rotary=settings.rotary,
            rotates=row.rotary is not None and has_rotary(layer.get_submodule(row.attention)),
            cache_argument=row.cache_argument,
        )
        layer.set_submodule(row.attention, attention)


def keep_frequencies(base: nn.Module, row: Architecture) -> None:
    """Rotary frequencies stay those of short texts where others are meant for longer ones ("longrope", "dynamic"), and
    exact at any position.

    A stream has no length, and what a window sees is near. Otherwise a text in pieces would not be the text.

    Args:
        base: the headless base model.
        row: its family.
    """
    if row.rotary is None:
        return
    rotary: Any = base.get_submodule(row.rotary)
    if isinstance(rotary, EndlessRotary):
        return
    kinds = rotary.rope_type

    def kept(kind: str) -> str:
        return "default" if kind == "longrope" or "dynamic" in kind else kind

    if kinds == "longrope":  # loading fills in frequencies anew, by what the default is
        rotary.compute_default_rope_parameters = ROPE_INIT_FUNCTIONS[kinds]
    rotary.rope_type = {name: kept(kind) for name, kind in kinds.items()} if isinstance(kinds, dict) else kept(kinds)
    base.set_submodule(row.rotary, EndlessRotary(rotary))


_EXACT = 2**16
"""Positions whose angles are as exact in float32 as base models have them."""


class EndlessRotary(nn.Module):
    """A base model's rotary embedding, as exact far into a text as at its beginning.

    In float32 the angle of position 10 million is off by half a radian. So a position is taken for a multiple of 65,536
    and a rest: what the base model makes for the rest is turned by the angle of the multiple, without whole circles.
    Before 65,536 nothing changes, bit for bit.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(
        self, x: Tensor, position_ids: Int[Tensor, "B T"], *layer_type: str, **named: str
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B, T, d) each, as the base model's own gives them."""
        if can_be_read(position_ids) and int(position_ids.max()) < _EXACT:
            return self.rotary(x, position_ids, *layer_type, **named)
        made = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))  # rounded once, in the end
        cos, sin = self.rotary(made, position_ids % _EXACT, *layer_type, **named)
        # In float64, which not every device has: the angle of a multiple grows without end.
        place = x.device if x.device.type != "mps" else torch.device("cpu")
        multiple = (position_ids // _EXACT)[..., None].to(place).double()
        beyond = self._frequencies(*layer_type, *named.values()).to(place).double() * _EXACT
        angle = ((multiple * beyond) % (2 * math.pi)).float().to(x.device)
        far_cos, far_sin = (torch.cat((turn, turn), -1).to(cos.dtype) for turn in (angle.cos(), angle.sin()))
        turned = cos * far_cos - sin * far_sin, sin * far_cos + cos * far_sin
        if made.dtype == x.dtype:
            return turned
        dtype = self.rotary(x.new_empty(0), position_ids[..., :0], *layer_type, **named)[0].dtype
        return turned[0].to(dtype), turned[1].to(dtype)

    def _frequencies(self, layer_type: str | None = None) -> Float[Tensor, " half"]:
        return getattr(self.rotary, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")


def inverse_rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines by which a rotation undoes that by these, and their factor (YaRN has one).

    At least in float32: of a key that was rounded when it was rotated, no more is to be lost.
    """
    dtype = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    squares = cos.square() + sin.square()
    return cos / squares, -sin / squares


class ConstantPosition(nn.Module):
    """Stands where absolute positions were: the same vector everywhere."""

    def __init__(self, vectors: Float[Tensor, "positions d"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(vectors.detach().mean(0, keepdim=True))

    def forward(self, *given: Any, position_ids: Int[Tensor, "B T"] | None = None) -> Float[Tensor, "B T d"]:
        """The vector for each of these; some base models name them, and give a mask and a length before."""
        positions = given[0] if position_ids is None else position_ids
        return self.weight.expand(*positions.shape, -1)


def drop_positions(base: nn.Module, row: Architecture) -> None:
    """Put the mean of the positions where they are.

    Args:
        base: the headless base model.
        row: its family's, which has absolute positions.
    """
    assert row.positions is not None
    if isinstance(base.get_submodule(row.positions), nn.Embedding):
        base.set_submodule(row.positions, ConstantPosition(position_vectors(base, row)))
