"""Transfer: each layer learns to reproduce the teacher's attention from the teacher's own input, all layers at once.

The loss is layer by layer, so it needs no pass through the student's other parts, and errors do not add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastweights.training.blocks import positions_if_packed
from fastweights.training.finetune import peak_rates, train_attention
from fastweights.training.teacher import record_attention
from fastweights.training.trainer import StageTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.settings.training import TransferConfig

_BLOCKS_OF_THE_UNIT = 4


class TransferTrainer(StageTrainer):
    """Trains the converted layers alone; everything else in the model stays as it is."""

    config: TransferConfig
    teacher: PreTrainedModel

    def __init__(
        self, student: FastWeightsForCausalLM, teacher: PreTrainedModel, config: TransferConfig, *args, **kwargs
    ) -> None:
        self.teacher = teacher
        self.positions: Any = student.config.settings.positions
        train_attention(student, config.lora_rank)
        super().__init__(student, config, *args, **kwargs, rates=peak_rates(student, config))
        self.teacher.to(self.args.device)  # type: ignore[arg-type]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        position_ids = positions_if_packed(inputs["position_ids"])
        records = record_attention(self.teacher, inputs["input_ids"], position_ids, positions=self.positions)
        # One unit for the whole run: that of each batch alone would weigh batches of dull text far too much.
        records = [record._replace(variance=unit) for record, unit in zip(records, self.variances, strict=True)]
        outputs = model(attention_records=records, position_ids=position_ids)
        # A mean over this batch: the Trainer divides by accumulation steps itself only if told that nobody did.
        self.loss_is_scaled_for_ga = False
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def run(self, *, resume: bool) -> None:
        blocks = [self.train_dataset[i]["input_ids"] for i in range(min(_BLOCKS_OF_THE_UNIT, len(self.train_dataset)))]  # type: ignore[arg-type,index]
        first = torch.stack(blocks).to(self.args.device)
        records = record_attention(self.teacher, first, positions=self.positions)
        self.variances = [record.variance for record in records]
        super().run(resume=resume)
        self.model.requires_grad_(True)  # type: ignore[union-attr]
