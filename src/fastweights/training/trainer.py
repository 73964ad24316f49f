"""transformers' Trainer, and the four things that it lacks here.

A loss or weight that is not finite stops the run and is never saved; parameters that conversion added have their own
learning rate; a checkpoint that a kill cut off is never resumed from; progress is one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from fastweights.errors import FastWeightsError
from fastweights.training.progress import ProgressBar
from fastweights.training.runs import check_stage, last_checkpoint, mark_finished

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastweights.settings.training import RunConfig, StageConfig
    from fastweights.training.blocks import TokenBlocks


class StageTrainer(Trainer):
    """The Trainer of every stage; a stage overrides `compute_loss`."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: StageConfig,
        run: RunConfig,
        output: Path,
        blocks: TokenBlocks,
        tokenizer: PreTrainedTokenizerBase,
        *,
        title: str,
        new_parameters: Iterable[str] = (),
    ) -> None:
        check_stage(config, run, blocks)
        super().__init__(
            model=model,
            args=_arguments(config, run, output),
            train_dataset=blocks,
            processing_class=tokenizer,
            data_collator=default_data_collator,  # blocks need no padding
        )
        self.config = config
        self.output = output
        self.new_parameters = frozenset(new_parameters)
        tokens_per_step = config.tokens_per_step(blocks.block_size) * self.args.world_size
        self.remove_callback(PrinterCallback)
        self.add_callback(ProgressBar(title, tokens_per_step))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():  # type: ignore[union-attr]
                if parameter.requires_grad:
                    key = (self.learning_rate_of(name), name in decayed and parameter.ndim > 1)
                    groups.setdefault(key, []).append(parameter)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {"params": parameters, "lr": rate, "weight_decay": self.config.weight_decay if decays else 0.0}
                    for (rate, decays), parameters in groups.items()
                ],
                **arguments,
            )
        return self.optimizer

    def learning_rate_of(self, name: str) -> float:
        """Peak learning rate of a parameter."""
        new_rate = self.config.new_learning_rate or self.config.learning_rate
        return new_rate if name in self.new_parameters else self.config.learning_rate

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FastWeightsError(self._stopped(f"the loss is {loss.item()}"))
        return loss

    def _save_checkpoint(self, model, trial) -> None:
        for name, parameter in self.model.named_parameters():  # type: ignore[union-attr]
            if not torch.isfinite(parameter).all():
                raise FastWeightsError(self._stopped(f"{name} is no longer finite"))
        super()._save_checkpoint(model, trial)

    def _stopped(self, reason: str) -> str:
        kept = last_checkpoint(self.output)
        saved = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
        return f"training stopped at step {self.state.global_step + 1}: {reason}; {saved}; try a lower learning_rate"

    def run(self, *, resume: bool) -> None:
        """Train, then save the model and its tokenizer in the output folder.

        Args:
            resume: go on from the last whole checkpoint in the output folder, where there is one.
        """
        checkpoint = last_checkpoint(self.output) if resume else None
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self.save_model(str(self.output))
        self.save_state()
        if self.is_world_process_zero():
            mark_finished(self.output)
        self.accelerator.wait_for_everyone()


def _arguments(config: StageConfig, run: RunConfig, output: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=run.adam_beta2,
        max_grad_norm=run.max_grad_norm,
        bf16=run.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        seed=run.seed,
        data_seed=run.seed,
        save_steps=run.save_every,
        save_total_limit=2,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=run.report_to,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        # Pinned memory needs an accelerator, and the Trainer warns without one.
        dataloader_pin_memory=torch.cuda.is_available(),
    )
