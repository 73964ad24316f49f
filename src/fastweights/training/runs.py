"""A run on disk: what it was started with, how far it came, and where it can go on from.

An output folder has run.json (the resolved config and the versions it ran with) and a folder for each stage, with the
Trainer's checkpoints and, once the stage came to its end, its model and a mark that says so (`checkpoints.py`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from fastweights.errors import FastWeightsError, check_folder, reason_of
from fastweights.files import check_output_folder, only_run, said, things_in, write_text
from fastweights.layers.quantised import LINEAR, has_bf16_products
from fastweights.models.quantisation import weights_of
from fastweights.settings.conversion import ADDED
from fastweights.training.checkpoints import clear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from accelerate import PartialState
    from transformers import PreTrainedModel

    from fastweights.settings.grid import GridConfig
    from fastweights.settings.training import PretrainConfig, RunConfig, StageConfig, TrainConfig
    from fastweights.training.blocks import TokenBlocks

logger = logging.getLogger("fastweights")

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
TRAINER_STATE_FILE = "trainer_state.json"  # transformers' TRAINER_STATE_NAME, whose module is slow to import
# Each has a folder of its own in a run's.
_STAGES = ("transfer", "finetune", "meta", "short", "long")


CONVERTED = "converted model"
"""Among the things that a run reads: one that was converted before. Runs from earlier do not have it."""


def process_state() -> PartialState:
    """This process among those that accelerate or torchrun launched; on a machine without accelerator they use gloo."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """On this process's device; but weights in few bits are for CPUs, and stay where they are."""
    return model if weights_of(model) in LINEAR else model.to(process_state().device)  # type: ignore[arg-type]


def check_stage(config: StageConfig, run: RunConfig, blocks: TokenBlocks) -> None:
    """Refuse what a stage could not train with, before anything of an earlier run is touched."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(run.report_to):
            callback()  # says what is not installed
    except (ValueError, RuntimeError, ImportError) as error:
        raise FastWeightsError(f"report_to is {run.report_to!r}: {reason_of(error)}; or report to none") from error
    if len(blocks) < (needed := config.batch_size * process_state().num_processes):
        raise FastWeightsError(
            f"the training text has {len(blocks)} blocks of {blocks.block_size} tokens and a batch takes {needed}: "
            "give more text, a smaller block_size or a smaller batch_size"
        )


def check_start(config: TrainConfig | PretrainConfig | GridConfig, inputs: Iterable[str | Path | None]) -> None:
    """Refuse to write a run where something else is, or over what it reads.

    Args:
        config: the run's.
        inputs: models and texts that it reads; those that are no files or folders on this machine do not matter.

    Raises:
        FastWeightsError: says what is in the way, and what the run may do instead.
    """
    folder = config.output
    check_folder(folder)
    check_apart(folder, inputs)
    if config.resume:
        check_same_run(config)
    elif (folder / RUN_FILE).exists() and not config.overwrite:
        raise FastWeightsError(
            f"output {folder} has a run in it: go on with that run with --resume, start anew in its place with "
            "--overwrite, or give another folder"
        )
    else:
        check_output_folder(folder, overwrite=config.overwrite)


def check_apart(folder: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse a run's folder that is, or lies in, what the run reads, and one that would have it written over."""
    place = folder.resolve()
    for given in inputs:
        if not given or not (path := Path(given).resolve()).exists():
            continue
        if path == place or path in place.parents:
            raise FastWeightsError(f"output {folder} is, or lies in, {given}, which is read: give another folder")
        written = place == path.parent and path.is_file()
        if written or any(place / stage in (path, *path.parents) for stage in _STAGES):
            raise FastWeightsError(f"{given} lies in output {folder}, which is written to: give another folder")


@contextmanager
def begin_run(
    config: TrainConfig | PretrainConfig | GridConfig, inputs: Iterable[str | Path | None], contents: dict[str, str]
) -> Iterator[None]:
    """A folder for a run that begins, or goes on, and for it alone until the block ends.

    Whatever is to be refused was refused before. Of an earlier run that is not resumed, checkpoints and finished marks
    are cleared, so that this run does not go on from them later.

    Args:
        config: the run's.
        inputs: as for `check_start`.
        contents: digest of each of the things that it reads, wherever they lie.

    Raises:
        FastWeightsError: another run writes there, or has begun there since; the folder cannot be written to; or the
            run that is to go on read something else.
    """
    if config.run.precision == "bf16":
        _warn_of_bf16()
    check_start(config, inputs)  # before a lock lies in a folder that is not the run's
    with only_run(config.output):
        check_start(config, inputs)
        if config.resume:
            _check_contents(config.output, contents)
        else:
            for stage in _STAGES:
                clear(config.output / stage)
        if not config.resume or _is_evaluated_otherwise(config):
            (config.output / RESULTS_FILE).unlink(missing_ok=True)  # which a resume would take for this run's
        write_text(config.output / RUN_FILE, json.dumps(_described(config) | {"contents": contents}, indent=2) + "\n")
        yield


def _is_evaluated_otherwise(config: TrainConfig | PretrainConfig | GridConfig) -> bool:
    """Whether a run that goes on was evaluated with other settings before."""
    if not (config.output / RUN_FILE).exists():
        return False
    before = json.loads((config.output / RUN_FILE).read_text(encoding="utf-8"))["config"].get("evaluation")
    return before != _described(config)["config"].get("evaluation")


@cache
def _warn_of_bf16() -> None:
    if not torch.accelerator.is_available() and not has_bf16_products():
        logger.warning("precision is bf16, and this CPU has no products of bf16: --run.precision fp32 is faster here")


def _check_contents(folder: Path, contents: dict[str, str]) -> None:
    if not (folder / RUN_FILE).exists():
        return  # none was started here
    before = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("contents", {})
    for name, digest in contents.items():
        if before.get(name, digest if name == CONVERTED else None) != digest:
            raise FastWeightsError(
                f"the {name} is not what it was when the run in {folder} was started: put it back, or start anew with "
                "--overwrite"
            )


# What may change when a run goes on.
_FREE = ("config.resume", "config.overwrite", "config.output", "config.run.save_every", "config.run.save_minutes")
_FREE += ("config.run.log_every", "config.run.report_to", "config.run.compile", "config.evaluation.")
_FREE += ("config.run.activation_checkpointing",)
_FREE += ("versions.", "contents.")
# A grid may grow: its cells have configs of their own.
_FREE += ("config.rules", "config.feature_maps", "config.windows", "config.seeds")


ADDED_BY_SECTION = {"convert": ADDED, "finetune": {"vocabulary": "all"}}
"""Settings of a config that came later, with what was so in runs that do not know of them."""


def check_same_run(config: TrainConfig | PretrainConfig | GridConfig) -> None:
    """Refuse to go on with a run that was started with another config, or with something that is no run.

    Raises:
        FastWeightsError: names the first setting that differs, or what is there.
    """
    folder = config.output
    there = things_in(folder) if folder.exists() else []
    if not there:
        return  # none was started here
    if RUN_FILE not in there:
        raise FastWeightsError(
            f"output {folder} has {there[0]} in it and no {RUN_FILE}: no run to go on with; give the folder of one, or "
            "start anew with --overwrite"
        )
    try:
        before = _flat(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FastWeightsError(
            f"{folder / RUN_FILE} cannot be read ({said(error)}), so that nobody knows what run it was: put the file "
            "back, or start anew with --overwrite"
        ) from error
    after = _flat(_described(config))
    added = _flat(ADDED_BY_SECTION, "config.")
    before = {name: value for name, value in added.items() if name in after} | before
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name) and not name.startswith(_FREE):
            raise FastWeightsError(
                f"the run in {folder} was started with {name.removeprefix('config.')} {before.get(name)} and not "
                f"{after.get(name)}: resume it as it was started, or start anew with --overwrite"
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


def tokens_seen(stage: Path) -> int:
    """Tokens that the stage that trained in this folder has read, in all processes."""
    return _trainer_state(stage)["num_input_tokens_seen"]


def seconds_trained(stage: Path) -> float:
    """How long the stage that trained in this folder took."""
    last = _trainer_state(stage)["log_history"][-1]
    return last["seconds" if "seconds" in last else "train_runtime"]  # of earlier versions: since the last resume


def _trainer_state(stage: Path) -> dict:
    return json.loads((stage / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
