"""The trainer of `pretrain`."""

from __future__ import annotations

import torch

from fastweights.training.next_token import next_token_loss
from fastweights.training.trainer import StageTrainer


class PretrainTrainer(StageTrainer):
    """Next-token loss; blocks shorter than the context start at random positions, so that all are trained.

    Documents that start inside a block start at position 0.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids, positions = inputs["input_ids"], inputs["position_ids"]
        room: int = self.model.config.max_position_embeddings - input_ids.shape[1]  # type: ignore
        starts = torch.randint(0, room + 1, (len(input_ids), 1), device=input_ids.device)
        first = positions == torch.arange(input_ids.shape[1], device=input_ids.device)  # of the documents in a block
        positions = torch.where(first, positions + starts, positions)
        outputs = model(input_ids=input_ids, position_ids=positions, use_cache=False)
        self.loss_is_scaled_for_ga = False
        loss = next_token_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss
