"""Finetune: the model as a whole learns from text, and from the teacher's distribution over next tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, log_softmax

from fastweights.errors import FastWeightsError
from fastweights.layers.next_token_gradient import NO_LABEL
from fastweights.models.lora import add_lora
from fastweights.training.blocks import positions_if_packed
from fastweights.training.teacher import documents_apart
from fastweights.training.trainer import StageTrainer

_ELEMENTS = 1 << 18
"""Logits that are made distributions of at once: one megabyte in fp32, so that a second-level cache holds them."""

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.settings.training import ConversionStageConfig, FinetuneConfig


class FinetuneTrainer(StageTrainer):
    """Trains what the model makes of a text; the teacher is asked only where it counts."""

    config: FinetuneConfig

    def __init__(
        self,
        student: FastWeightsForCausalLM,
        teacher: PreTrainedModel | None,
        config: FinetuneConfig,
        *args,
        **kwargs,
    ) -> None:
        self.teacher = teacher
        if config.lora_rank and teacher is None:
            raise FastWeightsError("LoRA is kept as an adapter of the model that was converted: give that as teacher")
        if config.lora_rank or config.weights == "attention":
            train_attention(student, config.lora_rank)
        if not config.fast_weights:
            leave_windows_alone(student)
        super().__init__(student, config, *args, **kwargs, rates=peak_rates(student, config))
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
                mask = documents_apart(self.teacher, arguments["position_ids"])
                teacher_logits = self.teacher(**arguments, attention_mask=mask).logits
            loss = loss + weight * divergence(outputs.logits, teacher_logits)
        self.loss_is_scaled_for_ga = False
        return (loss, outputs) if return_outputs else loss


def train_attention(student: FastWeightsForCausalLM, lora_rank: int) -> None:
    """Leave nothing to train but the converted layers, or what was added to them, LoRA included if it has a rank."""
    if lora_rank:
        add_lora(student, lora_rank)
        return
    student.requires_grad_(False)
    for layer in student.fast_attentions():
        layer.requires_grad_(True)


def leave_windows_alone(student: FastWeightsForCausalLM) -> None:
    """Hold the fast weights of every layer at a factor of 0, with nothing in them to train.

    Raises:
        FastWeightsError: a layer has no window, and so nothing but fast weights.
    """
    for layer in student.fast_attentions():
        if not layer.window:
            raise FastWeightsError(
                f"fast_weights is off, and layer {layer.layer_idx} has no window that could be trained alone: set "
                "convert.window, or leave fast_weights on"
            )
        layer.fast_scale.requires_grad_(False).zero_()
        for module in (layer.rule, layer.query_map, layer.key_map):
            module.requires_grad_(False)


def peak_rates(student: FastWeightsForCausalLM, config: ConversionStageConfig) -> dict[str, float]:
    """Peak learning rates of what the conversion added; everything else has the stage's own."""
    return {
        name: config.factor_rate if name.endswith(("fast_scale", "window_scale")) else config.new_rate
        for name in student.new_parameter_names()
    }


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
    """Mean KL(teacher || student) over all positions, in nats; differentiable in the student's logits, once."""
    return _Divergence.apply(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1))


class _Divergence(torch.autograd.Function):
    """A few rows at a time, with its derivative at once: all distributions of a large vocabulary would be gigabytes."""

    @staticmethod
    def forward(ctx, student_logits: Float[Tensor, "N vocabulary"], teacher_logits: Float[Tensor, "N vocabulary"]):
        rows = max(1, _ELEMENTS // student_logits.shape[1])
        total, derivative = student_logits.new_zeros((), dtype=torch.float32), torch.empty_like(student_logits)
        parts = zip(*(x.split(rows) for x in (student_logits, teacher_logits, derivative)), strict=True)
        for student, teacher, d_student in parts:
            student, teacher = (log_softmax(logits.float(), -1) for logits in (student, teacher))
            p = teacher.exp()
            total += p.mul(teacher - student).sum()
            d_student.copy_(student.exp_().sub_(p).div_(len(student_logits)))
        ctx.save_for_backward(derivative)
        return total / len(student_logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Float[Tensor, ""]):
        (derivative,) = ctx.saved_tensors
        return derivative * d_loss.to(derivative.dtype), None
