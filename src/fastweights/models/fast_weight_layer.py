"""add_fast_weight_layer(): a causal language model, converted or not, gets the block of the second paper."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from fastweights.errors import FastWeightsError
from fastweights.layers.fast_weight_layer import FastWeightLayer, FastWeightLayerSettings
from fastweights.models.architectures import architecture_of
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.conversion import load_model, name_of
from fastweights.models.modeling import FastWeightsForCausalLM

if TYPE_CHECKING:
    from pathlib import Path


def add_fast_weight_layer(
    model: str | Path | PreTrainedModel, settings: FastWeightLayerSettings | None = None
) -> FastWeightsForCausalLM:
    """Put a Fast Weight Layer before the unembedding; it is the identity until it is trained (`train --stage meta`).

    Args:
        model: folder or hub name of the model, or the model itself, which stays as it is. One with softmax attention
            keeps it.
        settings: what the layer is made of.
    """
    settings = settings or FastWeightLayerSettings()
    model = copy.deepcopy(model) if isinstance(model, PreTrainedModel) else load_model(model)
    if not isinstance(model, FastWeightsForCausalLM):
        architecture_of(model.config)
        layer_types = ["full_attention"] * model.config.num_hidden_layers
        base_model = name_of(model)
        config = FastWeightsConfig(
            base_config=model.config,
            layer_types=layer_types,
            base_model=base_model,
            fast_weight_layer=asdict(settings),
        )
        return FastWeightsForCausalLM(config, base=model)
    if model.fast_weight_layer is not None:
        raise FastWeightsError("the model has a Fast Weight Layer already; give the model that it was added to")
    model.config.fast_weight_layer = asdict(settings)
    model.fast_weight_layer = FastWeightLayer(model.config.hidden_size, settings).to(model.device)
    return model
