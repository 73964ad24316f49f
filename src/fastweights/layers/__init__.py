"""Modules on top of the recurrences."""

from fastweights.layers.attention import FastWeightAttention, FastWeightSettings

__all__ = ["FastWeightAttention", "FastWeightSettings"]
