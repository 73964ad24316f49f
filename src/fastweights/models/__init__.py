"""Hugging Face models with fast weights: config, model and conversion."""

from fastweights import registration  # noqa: F401
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.conversion import add_fast_weight_layer, convert
from fastweights.models.loading import load_model
from fastweights.models.modeling import FastWeightsForCausalLM, FastWeightsModel

__all__ = [
    "FastWeightsConfig",
    "FastWeightsForCausalLM",
    "FastWeightsModel",
    "add_fast_weight_layer",
    "convert",
    "load_model",
]
