"""Hugging Face models with fast weights: config, model and conversion."""

from transformers import AutoConfig, AutoModelForCausalLM

from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.conversion import ConversionConfig, add_fast_weight_layer, convert
from fastweights.models.loading import load_model
from fastweights.models.modeling import FastWeightsForCausalLM

AutoConfig.register(FastWeightsConfig.model_type, FastWeightsConfig)
AutoModelForCausalLM.register(FastWeightsConfig, FastWeightsForCausalLM)

__all__ = [
    "ConversionConfig",
    "FastWeightsConfig",
    "FastWeightsForCausalLM",
    "add_fast_weight_layer",
    "convert",
    "load_model",
]
