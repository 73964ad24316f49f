"""Modules on top of the recurrences."""

from fastweights.layers.attention import FastWeightAttention
from fastweights.layers.fast_weight_layer import FastWeightLayer, FastWeightLayerSettings

__all__ = ["FastWeightAttention", "FastWeightLayer", "FastWeightLayerSettings"]
