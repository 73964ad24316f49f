"""Modules on top of the recurrences."""

from fastweights import registration  # noqa: F401
from fastweights.layers.attention import FastWeightAttention
from fastweights.layers.fast_weight_layer import FastWeightLayer

__all__ = ["FastWeightAttention", "FastWeightLayer"]
