"""transformers' Trainer, and the four things that it lacks here.

A loss or weight that is not finite stops the run and is never saved; parameters that conversion added have their own
learning rate; a checkpoint that a kill cut off is never resumed from; progress is one line.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastweights.errors import FastWeightsError, check_folder
from fastweights.training.progress import ProgressBar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastweights.data import TokenBlocks
    from fastweights.training.config import RunConfig, StageConfig

RUN_FILE = "run.json"
_FINISHED_FILE = "finished"


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
            (self.output / _FINISHED_FILE).touch()
        self.accelerator.wait_for_everyone()


def check_stage(config: StageConfig, run: RunConfig, blocks: TokenBlocks) -> None:
    """Refuse what a stage could not train with, before anything of an earlier run is touched."""
    try:
        get_reporting_integration_callbacks(run.report_to)
    except ValueError as error:
        raise FastWeightsError(f"report_to is {run.report_to!r}: {error}") from error
    if len(blocks) < (needed := config.batch_size * process_state().num_processes):
        raise FastWeightsError(
            f"the training text has {len(blocks)} blocks of {blocks.block_size} tokens and a batch takes {needed}: "
            "give more text, a smaller block_size or a smaller batch_size"
        )


def process_state() -> PartialState:
    """This process among those that accelerate or torchrun launched; on a machine without accelerator they use gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def tokens_seen(folder: Path) -> int:
    """Tokens that the stage that trained in `folder` has read, in all processes."""
    return json.loads((folder / TRAINER_STATE_NAME).read_text())["num_input_tokens_seen"]


def is_finished(folder: Path) -> bool:
    """Whether the stage that trains in `folder` came to its end."""
    return (folder / _FINISHED_FILE).exists()


def save_run(config: object, folder: Path, *, stages: Iterable[str], resume: bool) -> None:
    """Write the resolved config and the versions it ran with, so that the run can be repeated.

    Args:
        stages: that such a run may have, each with a folder of its own in `folder`.
        resume: the run goes on with one that was started in `folder`, which must have had the same config.
    """
    import fastweights

    check_folder(folder)
    run = {
        "stage": type(config).__name__,
        "config": dataclasses.asdict(config),  # type: ignore[call-overload]
        "versions": {
            "fastweights": fastweights.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    text = json.dumps(run, indent=2, default=str)
    if not resume:
        # What a run of another config has left to go on from, this one must not.
        for stage in stages:
            (folder / stage / _FINISHED_FILE).unlink(missing_ok=True)
            for checkpoint in (folder / stage).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(checkpoint)
    else:
        _check_same_run(folder, json.loads(text))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(text + "\n")


# What may change when a run goes on.
_FREE = ("config.resume", "config.output", "config.run.save_every", "config.run.log_every", "config.run.report_to")
_FREE += ("config.evaluation.", "versions.")


def _check_same_run(folder: Path, run: dict) -> None:
    try:
        before, after = _flat(json.loads((folder / RUN_FILE).read_text())), _flat(run)
    except (OSError, ValueError):
        return  # none was started here, or it was killed before it began
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name) and not name.startswith(_FREE):
            raise FastWeightsError(
                f"the run in {folder} was started with {name.removeprefix('config.')} {before.get(name)} and not "
                f"{after.get(name)}: resume it as it was started, or start anew without --resume"
            )


def _flat(settings: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    numbered = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(numbered, key=lambda path: -int(path.name.split("-")[-1])):
        if _is_whole(path):
            return path
    return None


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes its state last; a kill within that leaves JSON that ends early."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


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
