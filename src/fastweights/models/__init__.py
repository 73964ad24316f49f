"""Hugging Face models with fast weights: config, model and conversion."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.conversion import add_fast_weight_layer, convert
from fastweights.models.loading import load_model
from fastweights.models.modeling import FastWeightsForCausalLM, FastWeightsModel
from fastweights.models.settings import ConversionConfig

AutoConfig.register(FastWeightsConfig.model_type, FastWeightsConfig)
AutoModel.register(FastWeightsConfig, FastWeightsModel)
AutoModelForCausalLM.register(FastWeightsConfig, FastWeightsForCausalLM)

__all__ = [
    "ConversionConfig",
    "FastWeightsConfig",
    "FastWeightsForCausalLM",
    "FastWeightsModel",
    "add_fast_weight_layer",
    "convert",
    "load_model",
]
