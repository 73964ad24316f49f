"""A run on disk: what it was started with, how far it came, and where it can go on from.

An output folder has run.json (the resolved config and the versions it ran with) and a folder for each stage, with the
Trainer's checkpoints and, once the stage came to its end, its model and a mark that says so.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError, safe_open

from fastweights.errors import FastWeightsError, check_folder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from accelerate import PartialState

    from fastweights.settings.training import RunConfig, StageConfig
    from fastweights.training.blocks import TokenBlocks

RUN_FILE = "run.json"
_FINISHED_FILE = "finished"
# transformers' TRAINER_STATE_NAME and PREFIX_CHECKPOINT_DIR, whose modules are slow to import.
TRAINER_STATE_FILE = "trainer_state.json"
CHECKPOINT = "checkpoint"


def process_state() -> PartialState:
    """This process among those that accelerate or torchrun launched; on a machine without accelerator they use gloo."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def check_stage(config: StageConfig, run: RunConfig, blocks: TokenBlocks) -> None:
    """Refuse what a stage could not train with, before anything of an earlier run is touched."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks(run.report_to)
    except ValueError as error:
        raise FastWeightsError(f"report_to is {run.report_to!r}: {error}") from error
    if len(blocks) < (needed := config.batch_size * process_state().num_processes):
        raise FastWeightsError(
            f"the training text has {len(blocks)} blocks of {blocks.block_size} tokens and a batch takes {needed}: "
            "give more text, a smaller block_size or a smaller batch_size"
        )


def begin_run(config: object, folder: Path, *, stages: Iterable[str], resume: bool) -> None:
    """Make ready a folder for a run that begins, or for one that goes on, which must have the config it began with.

    Args:
        config: the run's, a dataclass.
        folder: the run's own.
        stages: that such a run may have, each with a folder of its own in `folder`; those of a run that is not resumed
            are cleared, so that this run does not go on from them later.
        resume: whether the run goes on.

    Raises:
        FastWeightsError: `folder` cannot be written to, or the run that is to go on had another config.
    """
    check_folder(folder)
    if resume:
        check_same_run(config, folder)
    else:
        clear_stages(folder, stages)
    write_run(config, folder)


def clear_stages(folder: Path, stages: Iterable[str]) -> None:
    """Delete checkpoints and finished marks of the stages of an earlier run in `folder`, and nothing else."""
    for stage in stages:
        (folder / stage / _FINISHED_FILE).unlink(missing_ok=True)
        for checkpoint in (folder / stage).glob(f"{CHECKPOINT}-*"):
            shutil.rmtree(checkpoint)


def write_run(config: object, folder: Path) -> None:
    """Write the resolved config and the versions it runs with, so that the run can be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps(_described(config), indent=2) + "\n")


# What may change when a run goes on.
_FREE = ("config.resume", "config.output", "config.run.save_every", "config.run.log_every", "config.run.report_to")
_FREE += ("config.evaluation.", "versions.")


def check_same_run(config: object, folder: Path) -> None:
    """Refuse to go on with a run that was started in `folder` with another config; none there, or half of one, is fine.

    Raises:
        FastWeightsError: names the first setting that differs.
    """
    try:
        before, after = _flat(json.loads((folder / RUN_FILE).read_text())), _flat(_described(config))
    except (OSError, ValueError):
        return  # none was started here, or it was killed before it began
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name) and not name.startswith(_FREE):
            raise FastWeightsError(
                f"the run in {folder} was started with {name.removeprefix('config.')} {before.get(name)} and not "
                f"{after.get(name)}: resume it as it was started, or start anew without --resume"
            )


def _described(config: object) -> dict:
    """What run.json holds, as JSON gives it back."""
    import fastweights

    described = {
        "stage": type(config).__name__,
        "config": dataclasses.asdict(config),  # type: ignore[call-overload]
        "versions": {
            "fastweights": fastweights.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return json.loads(json.dumps(described, default=str))


def _flat(settings: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def mark_finished(stage: Path) -> None:
    """Say that the stage that trains in this folder came to its end."""
    (stage / _FINISHED_FILE).touch()


def is_finished(stage: Path) -> bool:
    """Whether the stage that trains in this folder came to its end."""
    return (stage / _FINISHED_FILE).exists()


def tokens_seen(stage: Path) -> int:
    """Tokens that the stage that trained in this folder has read, in all processes."""
    return json.loads((stage / TRAINER_STATE_FILE).read_text())["num_input_tokens_seen"]


def last_checkpoint(stage: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    numbered = [path for path in stage.glob(f"{CHECKPOINT}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(numbered, key=lambda path: -int(path.name.split("-")[-1])):
        if _is_whole(path):
            return path
    return None


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes its state last; a kill within that leaves JSON that ends early."""
    try:
        json.loads((checkpoint / TRAINER_STATE_FILE).read_text())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True
