"""convert(): a causal language model gets fast weights; add_fast_weight_layer(): it gets a block that learns."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from fastweights.errors import FastWeightsError
from fastweights.layers.fast_weight_layer import FastWeightLayer, FastWeightLayerSettings
from fastweights.models.architectures import architecture_of
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.loading import load_model, name_of
from fastweights.models.modeling import FastWeightsForCausalLM


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """How a model's attention becomes fast weights."""

    rule: str = "decay"
    """Update rule of the fast weights: decay."""
    feature_map: str = "identity"
    """Feature map of queries and keys: identity."""
    window: int = 0
    """Tokens that an exact softmax sees beside the fast weights, 0 for none; memory stays constant either way."""
    layer_types: list[str] | None = None
    """Per layer linear_attention, hybrid_sliding or full_attention; by default all are converted."""
    value_gate: bool = True
    """Decay per value channel too, as in the paper."""
    rotary: bool = True
    """Give the fast weights queries and keys with rotary embedding, where the base model has one; the window's have."""
    gate_bias: tuple[float, float] = (2.0, 6.0)
    """First and last gate bias of a head at the start: a spread of time constants."""
    positions: Literal["keep", "drop"] = "keep"
    """Absolute positions of GPT-2: keep them (text ends at the trained length) or drop them (text of any length)."""


def convert(model: str | Path | PreTrainedModel, config: ConversionConfig | None = None) -> FastWeightsForCausalLM:
    """Replace the softmax attention of a pretrained model by fast weights, keeping every pretrained weight.

    The result needs training (`transfer`, then `finetune`) before it speaks like the original.

    Args:
        model: folder or hub name of the model, or the model itself, which stays as it is.
        config: how to convert; by default the paper's pure form.
    """
    config = config or ConversionConfig()
    base = copy.deepcopy(model) if isinstance(model, PreTrainedModel) else load_model(model)
    if isinstance(base, FastWeightsForCausalLM):
        raise FastWeightsError(f"{model} has fast weights already; give the model that it was converted from")
    architecture_of(base.config)
    return FastWeightsForCausalLM(
        FastWeightsConfig(
            base_config=base.config,
            rule=config.rule,
            feature_map=config.feature_map,
            layer_types=config.layer_types,
            window=config.window,
            value_gate=config.value_gate,
            rotary=config.rotary,
            gate_bias=list(config.gate_bias),
            positions=config.positions,
            base_model=name_of(base),
        ),
        base=base,
    )


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
