"""How weights start that neither a base model nor a checkpoint gives.

transformers asks the model that is nearest to each module how its weights start. For fast weights that is the base
model, which knows nothing of them, and knows its own attention only by a class that is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastweights.layers.attention import FastWeightAttention
from fastweights.layers.fast_weight_layer import FastWeightLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def mark_as_initialised(pretrained: nn.Module) -> None:
    """Keep the weights of all these modules: one that a user put in would start anew with the model around it."""
    for module in pretrained.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def initialise(model: nn.Module, base: PreTrainedModel, theirs: Callable[[], None]) -> None:
    """Let what was not loaded start as in a new model.

    Args:
        model: whose weights they are.
        base: the base model in it.
        theirs: what transformers does about it.
    """
    attentions = [module for module in model.modules() if isinstance(module, FastWeightAttention)]
    incomplete = [attention for attention in attentions if not _is_marked(attention)]
    theirs()
    for attention in attentions:
        _reset_missing(attention, attention.reset_new_parameters)
    for attention in incomplete:
        base._initialize_weights(_as_it_was(attention))
    for module in model.modules():
        if isinstance(module, FastWeightLayer):
            _reset_missing(module, module.reset_parameters)


def _is_marked(attention: FastWeightAttention) -> bool:
    projections = (attention.get_submodule(name) for name in attention.projections.modules())
    return all(getattr(projection, "_is_hf_initialized", False) for projection in projections)


def _as_it_was(attention: FastWeightAttention) -> nn.Module:
    """An attention of the base model's class with the same projections."""
    replaced = attention.replaced.__new__(attention.replaced)
    nn.Module.__init__(replaced)
    for name in attention.projections.modules():
        replaced.add_module(name, attention.get_submodule(name))
    return replaced


@torch.no_grad()
def _reset_missing(module: nn.Module, reset: Callable[[], None]) -> None:
    """Reset parameters and buffers, but for those that were loaded."""
    tensors = (*module.parameters(), *module.buffers())
    loaded = [(x, x.detach().clone()) for x in tensors if getattr(x, "_is_hf_initialized", False)]
    reset()
    for tensor, value in loaded:
        tensor.copy_(value)
