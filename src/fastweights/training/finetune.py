"""Finetune: the whole model learns from text, and from the teacher's distribution over next tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from fastweights.layers.next_token_gradient import NO_LABEL
from fastweights.training.blocks import positions_if_packed
from fastweights.training.trainer import StageTrainer

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.settings.training import FinetuneConfig


class FinetuneTrainer(StageTrainer):
    """Trains all weights; the teacher is asked only where it counts."""

    config: FinetuneConfig

    def __init__(self, student: FastWeightsForCausalLM, teacher: PreTrainedModel | None, *args, **kwargs) -> None:
        self.teacher = teacher
        super().__init__(student, *args, **kwargs, new_parameters=student.new_parameter_names())
        if teacher is not None:
            teacher.to(self.args.device)  # type: ignore[arg-type]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        arguments = {
            "input_ids": inputs["input_ids"],
            "position_ids": positions_if_packed(inputs["position_ids"]),
            "use_cache": False,
        }
        outputs = model(**arguments)
        loss = outputs.logits.new_zeros((), dtype=torch.float32)
        weight = self.config.kl_weight
        if weight < 1:
            loss = loss + (1 - weight) * next_token_loss(outputs.logits, inputs["labels"])
        if weight > 0:
            assert self.teacher is not None
            with torch.no_grad():
                teacher_logits = self.teacher(**arguments).logits
            loss = loss + weight * divergence(outputs.logits, teacher_logits)
        self.loss_is_scaled_for_ga = False
        return (loss, outputs) if return_outputs else loss


def next_token_loss(logits: Float[Tensor, "B T vocabulary"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token but the first, in nats; where the label is -100, a token does not count.

    Args:
        logits: of the token after each.
        labels: the tokens themselves.
    """
    labels = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def divergence(
    student_logits: Float[Tensor, "B T vocabulary"], teacher_logits: Float[Tensor, "B T vocabulary"]
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) over all positions, in nats."""
    student = log_softmax(student_logits.float(), -1).flatten(0, 1)
    teacher = log_softmax(teacher_logits.float(), -1).flatten(0, 1)
    return kl_div(student, teacher, reduction="batchmean", log_target=True)
