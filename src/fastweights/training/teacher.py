"""The teacher: the model that was converted, and what its attention does."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from fastweights.errors import FastWeightsError
from fastweights.models.architectures import architecture_of, attention_modules
from fastweights.models.loading import load_model, resolve_model
from fastweights.models.modeling import AttentionRecord, FastWeightsForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Int
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def load_teacher(student: FastWeightsForCausalLM, source: str | None = None) -> PreTrainedModel:
    """The model that `student` was converted from, frozen. `source` names it, or else the student's config does."""
    source = source or student.config.base_model
    if source is None:
        raise FastWeightsError("the model does not say what it was converted from: name that model with --teacher")
    teacher = load_model(resolve_model(source)).requires_grad_(False)
    if isinstance(teacher, FastWeightsForCausalLM):
        raise FastWeightsError(f"teacher {source} has fast weights itself; give the model that was converted")
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        ours, theirs = getattr(student.config.base, name), getattr(teacher.config, name)
        if ours != theirs:
            raise FastWeightsError(f"teacher {source} has {name} {theirs} and the converted model {ours}")
    return teacher


@torch.no_grad()
def record_attention(
    teacher: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"] | None = None,
    *,
    positions: Literal["keep", "drop"] = "keep",
) -> list[AttentionRecord]:
    """Read `input_ids` with the teacher and keep each layer's attention input and output.

    Args:
        position_ids: of each token, where documents start inside a block; by default a block is one document.
        positions: the student's. Where it drops the teacher's absolute positions, its layers are given what the
            teacher's would get without them: the residual stream is a sum, in which each position is one term.
    """
    architecture = architecture_of(teacher.config)
    without = None
    if positions == "drop" and architecture.positions is not None:
        places = torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
        embedding = teacher.get_submodule(architecture.positions)(places)
        without = teacher.get_parameter(f"{architecture.positions}.weight").mean(0) - embedding
    with _recording(teacher) as (streams, calls):
        teacher.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    records = []
    for layer, stream, (inputs, output, rotary) in zip(_layers(teacher), streams, calls, strict=True):
        norm = layer.get_submodule(architecture.norm)
        given = inputs if without is None else norm(stream + without)
        records.append(AttentionRecord(given, output, output.var(correction=0), inputs, rotary))
    return records


def _layers(teacher: PreTrainedModel) -> list[nn.Module]:
    return list(teacher.get_submodule(architecture_of(teacher.config).layers))  # type: ignore[arg-type]


@contextmanager
def _recording(teacher: PreTrainedModel) -> Iterator[tuple[list[Tensor], list[tuple]]]:
    """The residual stream before each layer; and inputs, output and rotary embedding of each layer's attention."""
    streams: list[Tensor] = []
    calls: list[tuple] = []

    def inputs_of(args, kwargs) -> Tensor:
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def keep_stream(module, args, kwargs) -> None:
        streams.append(inputs_of(args, kwargs))

    def keep_call(module, args, kwargs, output) -> None:
        calls.append((inputs_of(args, kwargs), output[0], kwargs.get("position_embeddings")))

    attention = attention_modules(teacher, architecture_of(teacher.config))
    hooks = [layer.register_forward_pre_hook(keep_stream, with_kwargs=True) for layer in _layers(teacher)]
    hooks += [module.register_forward_hook(keep_call, with_kwargs=True) for module in attention]
    try:
        yield streams, calls
    finally:
        for hook in hooks:
            hook.remove()
