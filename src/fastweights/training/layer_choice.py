"""Which layers keep their softmax attention: those that are missed most when one at a time is converted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import is_hybrid, without_fast_weights
from fastweights.models.architectures import local_layers
from fastweights.models.conversion import check_softmax, convert
from fastweights.reading.stream import check_block_size
from fastweights.training.blocks import positions_if_packed
from fastweights.training.calibration import fit_layers
from fastweights.training.next_token import divergence
from fastweights.training.teacher import record_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.settings.conversion import ConversionConfig
    from fastweights.training.blocks import TokenBlocks

_BLOCKS = 4


def choose_layers(
    model: PreTrainedModel,
    settings: ConversionConfig,
    blocks: TokenBlocks,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ConversionConfig, list[float]]:
    """Resolve `layers="auto:N"`: all layers are converted but the N whose conversion alone changes the model most.

    Args:
        model: a causal language model with softmax attention; it stays as it is.
        settings: how it is to be converted.
        blocks: text, of which a few are read.
        progress: is told layers done and layers in all.

    Returns:
        The settings with a type for each layer, and the divergence in nats that converting each layer alone gives.

    Raises:
        FastWeightsError: more layers are to be kept than the model has, the blocks reach beyond its absolute positions,
            or as `convert` does.
    """
    check_softmax(model, model.name_or_path or type(model).__name__)
    layers, kept = model.config.num_hidden_layers, settings.layers_kept or 0
    local = local_layers(model.config)
    most = layers - len(local) - 1
    if kept > most:
        raise FastWeightsError(f"layers is {settings.layers}; the model has {most + 1} to convert: keep at most {most}")
    found = layer_divergences(model, settings, blocks, progress)
    missed = sorted(set(range(layers)) - local, key=lambda i: -found[i])
    return settings.converting(missed[kept:], layers, local), found


@torch.no_grad()
def layer_divergences(
    model: PreTrainedModel,
    settings: ConversionConfig,
    blocks: TokenBlocks,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """KL(model || model with one layer converted) for each layer, in nats a token; nothing is trained.

    A hybrid layer stands there with its window alone, a pure one with the factors that least squares give it; one that
    has a window already stays as it is.

    Args:
        model: a causal language model with softmax attention; it stays as it is.
        settings: how a layer is converted.
        blocks: text, of which a few are read.
        progress: is told layers done and layers in all.
    """
    check_block_size(model, blocks.block_size)
    layers, local = model.config.num_hidden_layers, local_layers(model.config)
    # Whatever the model is to do without, these are its own layers, with the window that is to be most layers'.
    settings = replace(settings, positions="keep", wide_window=0)
    chosen = [blocks[i * len(blocks) // _BLOCKS] for i in range(min(_BLOCKS, len(blocks)))]
    read = [(block["input_ids"][None], positions_if_packed(block["position_ids"][None])) for block in chosen]
    read = [(ids.to(model.device), None if places is None else places.to(model.device)) for ids, places in read]
    originals = [_logits(model, *block) for block in read]
    records = record_attention(model, torch.cat([ids for ids, _ in read]))
    found = []
    for layer in range(layers):
        if layer in local:
            found.append(0.0)
            continue
        swapped = convert(model, settings.converting({layer}, layers)).eval()
        if is_hybrid(swapped):
            with without_fast_weights(swapped) as window:
                found.append(_divergence(window, read, originals))
        else:
            fit_layers(swapped, records)
            found.append(_divergence(swapped, read, originals))
        if progress is not None:
            progress(layer + 1, layers)
    return found


def _logits(model: PreTrainedModel, ids: Int[Tensor, "1 T"], places: Int[Tensor, "1 T"] | None) -> Tensor:
    return model(input_ids=ids, position_ids=places, use_cache=False).logits


def _divergence(model: FastWeightsForCausalLM, read: list, originals: list[Tensor]) -> float:
    each = [divergence(_logits(model, *block), logits) for block, logits in zip(read, originals, strict=True)]
    return torch.stack(each).mean().item()
