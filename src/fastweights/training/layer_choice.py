"""Which layers keep their softmax attention, or have the wide window: those that the model misses most.

Layers make up for each other, so one that is missed when it alone is converted may be of no use where all others are,
and two may be worth more than both alone. Where windows stand for what is converted, layers are therefore given back
one after another to a model that is converted as a whole. Fast weights alone, before they are trained, are nothing to
begin with, so that there each layer is converted alone.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import without_fast_weights
from fastweights.models.architectures import architecture_of, local_layers
from fastweights.models.conversion import check_causal_model, check_softmax, convert
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
_ASKED_AGAIN = 10
"""Layers that are measured anew once one was given back: those that were worth most before."""


def choose_layers(
    model: PreTrainedModel,
    settings: ConversionConfig,
    blocks: TokenBlocks,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ConversionConfig, list[float]]:
    """Resolve `layers="auto:N"`: all layers are converted but the N that are missed most.

    With a window these are found one after another: the layer that brings the converted model nearest to the original
    is given back to it, then the next. Without, they are those whose conversion alone changes the model most.

    Args:
        model: a causal language model with softmax attention; it stays as it is.
        settings: how it is to be converted.
        blocks: text, of which a few are read.
        progress: is told measurements done, and in all.

    Returns:
        The settings with a type for each layer, and what each is worth: by how much the divergence from the original
        fell, or would have fallen when last measured, as it was given back; without a window, how far its conversion
        alone takes the model. In nats a token.

    Raises:
        FastWeightsError: more layers are to be kept than the model has, the blocks reach beyond its absolute positions,
            or as `convert` does.
    """
    check_causal_model(model)
    check_softmax(model, model.name_or_path or type(model).__name__)
    layers, kept = model.config.num_hidden_layers, settings.layers_kept or 0
    local = local_layers(model.config)
    most = layers - len(local) - 1
    if kept > most:
        raise FastWeightsError(f"layers is {settings.layers}; the model has {most + 1} to convert: keep at most {most}")
    check_block_size(model, blocks.block_size)
    # Whatever the model is to do without, these are its own layers.
    search = _Search(model, replace(settings, positions="keep"), blocks)
    if settings.window:
        given, found = search.give_back(kept, progress)
    else:
        found = search.convert_alone(progress)
        given = sorted(search.candidates, key=lambda i: -found[i])[:kept]
    return settings.converting(search.candidates - set(given), layers, local), found


class _Search:
    """Conversions of some layers, and how far from the original they are.

    Args:
        model: the original.
        settings: how a layer is converted.
        blocks: text, of which a few are read.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, settings: ConversionConfig, blocks: TokenBlocks) -> None:
        self.model, self.settings = model, settings
        self.layers: int = model.config.num_hidden_layers
        self.local = local_layers(model.config)
        self.candidates = set(range(self.layers)) - self.local
        chosen = [blocks[i * len(blocks) // _BLOCKS] for i in range(min(_BLOCKS, len(blocks)))]
        read = [(block["input_ids"][None], positions_if_packed(block["position_ids"][None])) for block in chosen]
        self.read = [(ids.to(model.device), None if at is None else at.to(model.device)) for ids, at in read]
        self.originals = [_logits(model, *block) for block in self.read]

    @torch.no_grad()
    def give_back(self, count: int, progress: Callable[[int, int], None] | None) -> tuple[list[int], list[float]]:
        """So many layers, one after another, to a model whose windows stand alone; nothing is trained.

        Args:
            count: of layers.
            progress: as of `choose_layers`.

        Returns:
            The layers, in the order in which they were given back, and what each layer was worth when last measured.
        """
        trials = [len(self.candidates), *(min(_ASKED_AGAIN, len(self.candidates) - turn) for turn in range(1, count))]
        total, done = sum(trials[:count]), 0
        given: list[int] = []
        worth = dict.fromkeys(range(self.layers), 0.0)
        asked = sorted(self.candidates)
        for _ in range(count):
            before, outputs = self._measure(given, record=True)
            for layer in asked:
                worth[layer] = before - self._measure([*given, layer], outputs, first=layer)[0]
                done += 1
                if progress is not None:
                    progress(done, total)
            given.append(max(asked, key=lambda i: worth[i]))
            asked = sorted(self.candidates - set(given), key=lambda i: -worth[i])[:_ASKED_AGAIN]
        return given, list(worth.values())

    def _measure(
        self, kept: list[int], outputs: list[list[Any]] | None = None, first: int = 0, *, record: bool = False
    ) -> tuple[float, list[list[Any]]]:
        """Divergence from the original of the window alone in all layers but these.

        Args:
            kept: layers.
            outputs: of each layer in each block, where those before `first` are what they would be here.
            first: the first layer that is to be computed.
            record: whether to return what each layer gives.
        """
        swapped = self._converted(self.candidates - set(kept))
        modules: Any = swapped.model.base.get_submodule(architecture_of(self.model.config).layers)
        now: list[Any] = []
        for i in range(first):
            modules[i].forward = lambda *_, i=i, **__: now[i]  # this model is thrown away
        found: list[list[Any]] = []
        if record:
            for module in modules:
                module.register_forward_hook(lambda _, __, output: found[-1].append(output))
        each = []
        with without_fast_weights(swapped):
            for at, (block, logits) in enumerate(zip(self.read, self.originals, strict=True)):
                now = [] if outputs is None else outputs[at]
                found.append([])
                each.append(divergence(_logits(swapped, *block), logits))
        return torch.stack(each).mean().item(), found

    def _converted(self, chosen: set[int]) -> FastWeightsForCausalLM:
        gc.collect()  # the one before, whose parts know each other: memory has no room for many
        return convert(self.model, self.settings.converting(chosen, self.layers, self.local)).eval()

    @torch.no_grad()
    def convert_alone(self, progress: Callable[[int, int], None] | None) -> list[float]:
        """KL(model || model with one layer converted) for each layer, with the factors that least squares give it.

        Args:
            progress: as of `choose_layers`.
        """
        records = record_attention(self.model, torch.cat([ids for ids, _ in self.read]))
        found = [0.0] * self.layers
        for done, layer in enumerate(sorted(self.candidates), 1):
            swapped = self._converted({layer})
            fit_layers(swapped, records)
            each = [
                divergence(_logits(swapped, *block), logits)
                for block, logits in zip(self.read, self.originals, strict=True)
            ]
            found[layer] = torch.stack(each).mean().item()
            if progress is not None:
                progress(done, len(self.candidates))
        return found


def _logits(
    model: PreTrainedModel | FastWeightsForCausalLM, ids: Int[Tensor, "1 T"], places: Int[Tensor, "1 T"] | None
) -> Tensor:
    return model(input_ids=ids, position_ids=places, use_cache=False).logits
