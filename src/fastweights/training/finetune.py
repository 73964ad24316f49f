"""Finetune: the model as a whole learns from text, and from the teacher's distribution over next tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from fastweights.errors import FastWeightsError
from fastweights.models.lora import add_lora
from fastweights.training.blocks import TokenBlocks, positions_if_packed
from fastweights.training.next_token import Targets, read_out_loss
from fastweights.training.teacher import documents_apart
from fastweights.training.trainer import StageTrainer

if TYPE_CHECKING:
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
        self.vocabulary = None
        if config.vocabulary == "seen":
            assert isinstance(self.train_dataset, TokenBlocks)
            self.vocabulary = self.train_dataset.vocabulary().to(self.args.device)
        if teacher is not None:
            teacher.to(self.args.device)  # type: ignore[arg-type]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        arguments = {
            "input_ids": inputs["input_ids"],
            "position_ids": positions_if_packed(inputs["position_ids"]),
            "use_cache": False,
        }
        weight, states, head = self.config.kl_weight, None, None
        if weight > 0:
            assert self.teacher is not None
            with torch.no_grad():
                mask = documents_apart(self.teacher, arguments["position_ids"])
                states = self.teacher.base_model(**arguments, attention_mask=mask).last_hidden_state
            head = self.teacher.get_output_embeddings()
        loss_of = partial(read_out_loss, teacher_head=head, kl_weight=weight, vocabulary=self.vocabulary)
        outputs = model(
            **arguments,
            loss_of=loss_of,
            targets=Targets(inputs["labels"], states),
        )
        self.loss_is_scaled_for_ga = False
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def train_attention(student: FastWeightsForCausalLM, lora_rank: int) -> None:
    """Leave nothing to train but the converted layers, or what was added to them, LoRA included if it has a rank."""
    if lora_rank:
        add_lora(student, lora_rank)
        return
    student.requires_grad_(False)
    for layer in student.fast_attentions():
        layer.requires_grad_(True)


def check_windows(student: FastWeightsForCausalLM) -> None:
    """Refuse a model of which a layer has no window that could be trained alone."""
    for layer in student.fast_attentions():
        if not layer.window:
            raise FastWeightsError(
                f"fast_weights is off, and layer {layer.layer_idx} has no window that could be trained alone: set "
                "convert.window, or leave fast_weights on"
            )


def leave_windows_alone(student: FastWeightsForCausalLM) -> None:
    """Hold the fast weights of every layer at a factor of 0, with nothing in them to train.

    Raises:
        FastWeightsError: a layer has no window, and so nothing but fast weights.
    """
    check_windows(student)
    for layer in student.fast_attentions():
        for factor in layer.factors_of_fast_weights():
            factor.requires_grad_(False).zero_()
        layer.window_only = True
        for module in layer.new_modules():
            if module is not layer.convolution:  # which is the window's as well
                module.requires_grad_(False)


def peak_rates(student: FastWeightsForCausalLM, config: ConversionStageConfig) -> dict[str, float]:
    """Peak learning rates of what the conversion added; everything else has the stage's own."""
    return {
        name: config.factor_rate if name.endswith(("fast_scale", "window_scale")) else config.new_rate
        for name in student.new_parameter_names()
    }
