"""The teacher: the model that was converted, and what its attention does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from fastweights.errors import FastWeightsError
from fastweights.models.architectures import architecture_of, position_vectors
from fastweights.models.documents import Numbers, documents_masks
from fastweights.models.loading import load_model
from fastweights.models.modeling import AttentionRecord, FastWeightsForCausalLM
from fastweights.models.recording import record_calls

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel


def load_teacher(student: FastWeightsForCausalLM, source: str | None = None) -> PreTrainedModel:
    """The model that `student` was converted from, frozen. `source` names it, or else the student's config does."""
    source = source or student.config.base_model
    if source is None:
        raise FastWeightsError("the model does not say what it was converted from: name that model with --teacher")
    teacher = load_model(source).requires_grad_(False)
    if isinstance(teacher, FastWeightsForCausalLM):
        raise FastWeightsError(f"teacher {source} has fast weights itself; give the model that was converted")
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        ours, theirs = getattr(student.config.base, name), getattr(teacher.config, name)
        if ours != theirs:
            raise FastWeightsError(f"teacher {source} has {name} {theirs} and the converted model {ours}")
    return teacher


def documents_apart(
    teacher: PreTrainedModel, position_ids: Int[Tensor, "B T"] | None
) -> Tensor | dict[str, Tensor] | None:
    """The mask that keeps packed documents apart; OPT would not do so by their positions. None for one document."""
    if position_ids is None:
        return None
    return documents_masks(teacher.config, Numbers.of(position_ids == 0, None), teacher.dtype)


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
    row, headless = architecture_of(teacher.config), teacher.base_model
    without = None
    if positions == "drop" and row.positions is not None:
        places = torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
        vectors = position_vectors(headless, row)
        without = vectors.mean(0) - vectors[places]
    mask = documents_apart(teacher, position_ids)
    with record_calls(headless, row) as calls:
        headless(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    records = []
    for layer, call in zip(headless.get_submodule(row.layers), calls, strict=True):  # type: ignore[arg-type]
        given = call.inputs if without is None else layer.get_submodule(str(row.norm))(call.stream + without)
        variance = call.output.var(correction=0)
        records.append(AttentionRecord(given, call.output, variance, call.inputs, call.position_embeddings))
    return records
