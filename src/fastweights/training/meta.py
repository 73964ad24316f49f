"""Meta: a Fast Weight Layer learns, by backpropagation through its own gradient steps, to learn from what it reads.

K. Clark et al., "Meta-Learning Fast Weight Language Models" (arXiv 2212.02475): the loss is that of the fast pass, and
second-order terms are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastweights.stream import reads_without_end
from fastweights.training.finetune import next_token_loss
from fastweights.training.trainer import StageTrainer

if TYPE_CHECKING:
    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.training.config import MetaConfig

LAYER = "fast_weight_layer."


class MetaTrainer(StageTrainer):
    """Trains the Fast Weight Layer, and the model below if `base_learning_rate` says so.

    Args:
        block_size: tokens that the model below reads at once; the training blocks are `config.blocks` times as long.
    """

    config: MetaConfig

    def __init__(self, model: FastWeightsForCausalLM, config: MetaConfig, *args, block_size: int, **kwargs) -> None:
        layer = model.fast_weight_layer
        assert layer is not None
        model.requires_grad_(config.base_learning_rate is not None)
        layer.requires_grad_(True)
        self.restart_every = block_size if config.blocks > 1 and not reads_without_end(model) else None
        super().__init__(
            model, config, *args, **kwargs, new_parameters=(LAYER + n for n in layer.small_parameter_names())
        )

    def learning_rate_of(self, name: str) -> float:
        if name.startswith(LAYER):
            return super().learning_rate_of(name)
        assert self.config.base_learning_rate is not None
        return self.config.base_learning_rate

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids = inputs["input_ids"]
        if self.config.base_learning_rate is None:
            self.model.model.eval()  # type: ignore[union-attr]  (frozen: it does not drop out either)
        outputs = model(input_ids=input_ids, use_cache=False, restart_every=self.restart_every)
        loss = next_token_loss(outputs.logits, input_ids)
        self.loss_is_scaled_for_ga = False
        return (loss, outputs) if return_outputs else loss

    def run(self, *, resume: bool) -> None:
        super().run(resume=resume)
        self.model.requires_grad_(True)  # type: ignore[union-attr]
