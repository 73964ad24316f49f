"""transformers' Trainer, and the five things that it lacks here.

A loss or weight that is not finite stops the run and is never saved; parameters that conversion added have their own
learning rate; a checkpoint that is not whole is never resumed from, nor another deleted for it; SIGTERM and Ctrl-C
end a run with a checkpoint; progress is one line.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback, TrainerState

from fastweights.errors import DivergedError, FastWeightsError
from fastweights.files import model_written_whole, said
from fastweights.models.adapters import save_adapter
from fastweights.models.architectures import architecture_of
from fastweights.models.loading import not_finite
from fastweights.models.lora import lora_rank, tensors_beside
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.progress import Progress
from fastweights.training.checkpoints import (
    CHECKPOINT,
    FINISHED,
    checkpoint_to_resume,
    drop_others,
    last_checkpoint,
    seal,
)
from fastweights.training.progress import Clock, ProgressBar
from fastweights.training.runs import TRAINER_STATE_FILE, check_stage
from fastweights.training.saving import Saving

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastweights.settings.training import RunConfig, StageConfig
    from fastweights.training.blocks import TokenBlocks

logger = logging.getLogger("fastweights")


class StageTrainer(Trainer):
    """The Trainer of every stage; a stage overrides `compute_loss`."""

    teacher: PreTrainedModel | None = None
    """The model that was converted, in stages that have one."""

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
        rates: Mapping[str, float] | None = None,
    ) -> None:
        check_stage(config, run, blocks)
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=_arguments(config, run, output),
            train_dataset=blocks,
            processing_class=tokenizer,
            data_collator=default_data_collator,  # blocks need no padding
        )
        model.config.use_cache = use_cache  # which the Trainer switches off, and is saved with the model
        if run.compile:
            for each in filter(None, (model, self.teacher)):
                compile_around_attention(each)
        self.config = config
        self.output = output
        self.rates = {} if rates is None else rates
        tokens_per_step = config.tokens_per_step(blocks.block_size) * self.args.world_size
        self.progress = Progress(title, show=self.is_world_process_zero())
        self.saving = Saving(self, run.save_minutes)
        self.clock = Clock()
        self.remove_callback(PrinterCallback)
        self.add_callback(ProgressBar(self.progress, tokens_per_step))
        self.add_callback(self.saving)
        self.add_callback(self.clock)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            if self.config.weight_decay:  # else groups are as in checkpoints from before there was this difference
                decayed -= set(_starting_as_identity(model))
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
        return self.rates.get(name, self.config.learning_rate)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Around all of `compute_loss`: accelerate has it around the model that is trained, not around a teacher."""
        return self.accelerator.autocast()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise DivergedError(self._stopped(f"the loss is {loss.item()}"))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Each entry of the loss history has the seconds of training up to it, those before a resume included."""
        logs["seconds"] = self.clock.seconds
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Of a model with LoRA what is not the base model's own, which stays as it was: a checkpoint of some MB."""
        if state_dict is None and lora_rank(self.model):  # type: ignore[arg-type]
            state_dict = tensors_beside(self.model)  # type: ignore[arg-type]
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        if bad := not_finite(dict(self.model.named_parameters())):  # type: ignore[union-attr]
            raise DivergedError(self._stopped(f"{bad} is no longer finite"))
        folder = self.output / f"{CHECKPOINT}-{self.state.global_step}"
        with self._writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                seal(folder, folder.rglob("*"))
                drop_others(folder)

    @property
    def may_save(self) -> bool:
        """Whether a run that went on from here would be as one that was not cut off."""
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Whatever keeps a library from writing, such as a full disk, is one line, and half a checkpoint goes."""
        try:
            yield
        except Exception as error:  # tokenizers raises no other class
            if folder != self.output:
                shutil.rmtree(folder, ignore_errors=True)
            raise FastWeightsError(
                f"cannot write {folder}: {said(error.__cause__ or error)}; {self._kept()}; make room, then go on with "
                "--resume"
            ) from error

    def _kept(self) -> str:
        kept = last_checkpoint(self.output)
        return f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"

    def _stopped(self, reason: str) -> str:
        step = self.state.global_step + 1
        return f"training stopped at step {step}: {reason}; {self._kept()}; try a lower learning_rate"

    def run(self, *, resume: bool) -> None:
        """Train, then save the model and its tokenizer in the output folder.

        Args:
            resume: go on from the last whole checkpoint in the output folder, where there is one.

        Raises:
            DivergedError: the loss or a weight is no longer finite.
            FastWeightsError: something cannot be written, or read back.
            SystemExit: the process got SIGTERM or Ctrl-C, and saved a checkpoint.
        """
        found = [str(checkpoint_to_resume(self.output) or "") if resume and self.is_world_process_zero() else ""]
        checkpoint = broadcast_object_list(found)[0]
        with self.saving.until_told(), self.progress:
            if checkpoint and (state := _state_in(checkpoint)).global_step >= self.config.steps:
                self._take_up(
                    checkpoint, state
                )  # the Trainer looks at the number of steps after each, and would take one
            else:
                self.train(resume_from_checkpoint=checkpoint or None)
        if self.saving.told_to_stop.is_set():
            if self.is_world_process_zero():
                step = self.state.global_step
                told = self.saving.signal.name
                logger.warning(
                    "stopped by %s at step %d; a checkpoint was written, --resume goes on from it", told, step
                )
            raise SystemExit(128 + self.saving.signal)
        with self._writing(self.output):
            main = self.is_world_process_zero()
            self._write_model(main)
            self.save_state()
            if main:
                seal(self.output, (file for file in self.output.iterdir() if file.is_file()), FINISHED)
        self.accelerator.wait_for_everyone()

    def _take_up(self, checkpoint: str, state: TrainerState) -> None:
        """Be where the last step left the stage."""
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if not state.log_history:  # how long it took is read from there
            self.clock.on_train_begin(self.args, state, self.control)
            self.log({})

    def _write_model(self, main: bool) -> None:
        """The model with its tokenizer, or of one with LoRA the adapter."""
        if lora_rank(self.model):  # type: ignore[arg-type]
            if main:
                save_adapter(self.model, self.output, base=self.teacher, replace=True)  # type: ignore[arg-type]
            return
        with model_written_whole(self.output) if main else nullcontext(self.output) as folder:
            self.save_model(str(folder))


def _state_in(checkpoint: str) -> TrainerState:
    with _reading(checkpoint):
        return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_FILE))


def _starting_as_identity(model: torch.nn.Module) -> Iterator[str]:
    """Names of parameters in modules whose matrices start as the identity: at 0 they would let nothing through."""
    for prefix, module in model.named_modules():
        if getattr(module, "starts_as_identity", False):
            yield from (f"{prefix}.{name}" for name, _ in module.named_parameters())


def compile_around_attention(model: PreTrainedModel) -> None:
    """Compile norms and feed-forward parts, in place: a few large operations where there were many small ones.

    Layers are alike, so that what one is compiled to serves all.

    Args:
        model: converted or not, of a known family.
    """
    headless: PreTrainedModel = (
        model.model.base if isinstance(model, FastWeightsForCausalLM) else model.base_model  # type: ignore[assignment]
    )
    row = architecture_of(headless.config)
    for layer in headless.get_submodule(row.layers).children():
        for name, part in layer.named_children():
            if name != row.attention:
                part.compile()


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """What torch refuses to load, such as a pickle that would run code, is one line."""
    try:
        yield
    except Exception as error:
        raise FastWeightsError(
            f"cannot go on from {checkpoint}: {said(error)}; delete it, to go on from the one before, or start anew "
            "with --overwrite"
        ) from error


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
        activation_checkpointing=run.activation_checkpointing,
        use_cpu=not torch.accelerator.is_available(),
        seed=run.seed,
        data_seed=run.seed,
        save_steps=run.save_every,
        save_total_limit=None,  # drop_others knows which of them are whole
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
