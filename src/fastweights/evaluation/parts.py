"""What each part of a hybrid model is worth.

Beside a result of the whole model stand those of its window alone and of its fast weights alone, of the window that its
teacher gives for nothing, without any training, and of the teacher itself.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from fastweights.errors import FastWeightsError
from fastweights.evaluation.perplexity import Evaluation, evaluate
from fastweights.models.conversion import convert_beside
from fastweights.models.modeling import FastWeightsForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import nn
    from transformers import PreTrainedModel

    from fastweights.data import TokenizedText
    from fastweights.settings.evaluation import EvaluationConfig

TEACHER = "teacher"
PARTS = ("window alone", "fast weights alone", "untrained window", TEACHER)
"""Of a hybrid model, in the order of tables."""


def is_hybrid(model: PreTrainedModel) -> TypeGuard[FastWeightsForCausalLM]:
    """Whether a model has both fast weights and a window, and so has parts."""
    return isinstance(model, FastWeightsForCausalLM) and any(layer.window for layer in model.fast_attentions())


def without_fast_weights(model: FastWeightsForCausalLM) -> AbstractContextManager[FastWeightsForCausalLM]:
    """The model whose converted layers have their windows alone, within a `with` block; then it is as it was.

    Args:
        model: of which all else stays: layers with softmax attention, a Fast Weight Layer.

    Returns:
        A context manager that gives the model.
    """
    return _at_zero(model, [factor for layer in model.fast_attentions() for factor in layer.factors_of_fast_weights()])


def without_window(model: FastWeightsForCausalLM) -> AbstractContextManager[FastWeightsForCausalLM]:
    """The model whose converted layers have their fast weights alone, within a `with` block; then it is as it was.

    Args:
        model: of which all else stays: layers with softmax attention, a Fast Weight Layer.

    Returns:
        A context manager that gives the model.
    """
    scales = (layer.window_scale for layer in model.fast_attentions())
    return _at_zero(model, [scale for scale in scales if scale is not None])


@contextmanager
def _at_zero(model: FastWeightsForCausalLM, factors: list[nn.Parameter]) -> Iterator[FastWeightsForCausalLM]:
    kept = [factor.detach().clone() for factor in factors]
    try:
        for factor in factors:
            factor.data.zero_()
        yield model
    finally:
        for factor, value in zip(factors, kept, strict=True):
            factor.data.copy_(value)


@contextmanager
def untrained_window(model: FastWeightsForCausalLM, teacher: PreTrainedModel) -> Iterator[FastWeightsForCausalLM]:
    """The teacher with the window of `model` in the place of its attention, and nothing trained.

    Absolute positions, where the teacher has them, are kept: without training, none does without them.
    """
    window = convert_beside(teacher, replace(model.config.settings, positions="keep"))
    with without_fast_weights(window):
        yield window


def parts(model: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, AbstractContextManager[PreTrainedModel]]:
    """A context manager for each of `PARTS`, which gives the model to read with; enter one at a time.

    Args:
        model: a hybrid model.
        teacher: the model that it was converted from.

    Raises:
        FastWeightsError: the model has no layer with both fast weights and a window.
    """
    if not is_hybrid(model):
        raise FastWeightsError("this model has no layers with fast weights and a window, so no parts: leave parts out")
    managers = (
        without_fast_weights(model),
        without_window(model),
        untrained_window(model, teacher),
        nullcontext(teacher),
    )
    return dict(zip(PARTS, managers, strict=True))


def evaluate_parts(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    text: TokenizedText,
    *,
    block_size: int = 1024,
    config: EvaluationConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """How well a hybrid model, named "all", and each of `PARTS` predict the same text.

    Args:
        model: a hybrid model; it is afterwards what it was.
        teacher: the model that it was converted from, on the same device.
        text: what they read.
        block_size: tokens that they read at once.
        config: as for `evaluate`.
        progress: as for `evaluate`, of each part anew.

    Returns:
        What the text cost each of them, by name.

    Raises:
        FastWeightsError: the model has no parts, or as `evaluate` does.
    """
    found = {}
    for name, manager in {"all": nullcontext(model), **parts(model, teacher)}.items():
        with manager as part:
            found[name] = evaluate(part, text, block_size=block_size, config=config, progress=progress)
    return found
