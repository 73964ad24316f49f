"""The first paper's comparison: update rules, feature maps and windows on the same model, trained alike, over seeds.

H. H. Mao, "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights", EMNLP 2022 (arXiv 2210.04243), compares
rules, each with feature maps. Here each cell of the grid is one `train` in a folder of its own; comparison.json has all
that are finished, and is whole at any time.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from fastweights.environment import environment
from fastweights.errors import DivergedError, FastWeightsError
from fastweights.evaluation.perplexity import Evaluation, plain
from fastweights.files import write_text
from fastweights.models import FastWeightsForCausalLM, load_model
from fastweights.models.loading import load_tokenizer, name_of, resolve_model
from fastweights.settings.grid import Cell, GridConfig
from fastweights.training.checkpoints import drop_all
from fastweights.training.pipeline import StageResult, contents_of, load_data, train
from fastweights.training.runs import ADDED_BY_SECTION, RUN_FILE, begin_run, check_start, process_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

GRID_FILE = "comparison.json"
_CELLS = "*-*-w*-s*"
# What cells of the same grid may differ in, or what says nothing of how one is trained or evaluated.
_FREE = ("rules", "feature_maps", "windows", "seeds", "resume", "overwrite", "output", "run")


@dataclass(frozen=True)
class CellResult:
    """What came of one training."""

    cell: Cell
    stages: list[StageResult]
    """As `train` returns them; none of a training that diverged."""
    diverged: str | None
    """Where its loss or a weight was no longer finite."""
    environment: dict[str, object]
    """Machine, versions and commit."""

    def plain(self) -> dict[str, object]:
        """As JSON has it."""
        about = {"diverged": self.diverged, "stages": [asdict(stage) for stage in self.stages]}
        return plain({**self.cell._asdict(), **about, "environment": self.environment})


@dataclass(frozen=True)
class Row:
    """A rule with a feature map and a window: means over the seeds that came to their end."""

    rule: str
    feature_map: str
    window: int
    seeds: list[int]
    diverged: list[int]
    """Seeds whose training diverged."""
    loss: float
    """Of the held-out text, in nats per token; infinite where no seed came to its end, as perplexity is."""
    perplexity: float
    retention: float
    """The original model's perplexity over this one's."""
    retention_spread: float | None
    """Standard deviation over the seeds, of which it takes two."""
    seconds: float
    """Of training one seed."""
    tokens_per_second: float
    parts: dict[str, float]
    """Of a hybrid model, the retention of the whole and of each part, on a part of the text."""


@dataclass(frozen=True)
class Grid:
    """All that is finished, and what is left out."""

    config: GridConfig
    results: dict[Cell, CellResult]
    left_out: dict[str, list[str]]
    """For each reason, the combinations that cannot be."""

    @property
    def ranking(self) -> list[Row]:
        """Best first; those of which a seed diverged come after all others."""
        rows: dict[tuple[str, str, int], list[CellResult]] = {}
        for cell, result in self.results.items():
            rows.setdefault((cell.rule, cell.feature_map, cell.window), []).append(result)
        return sorted(map(_row, rows.values()), key=lambda row: (bool(row.diverged), -row.retention, row.loss))

    def plain(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "config": _config(self.config),
            "left_out": self.left_out,
            "ranking": plain([asdict(row) for row in self.ranking]),
            "cells": [result.plain() for result in self.results.values()],
        }


def train_grid(config: GridConfig, say: Callable[[str], None] = lambda line: None) -> Iterator[Grid]:
    """Train all cells, one after another, and write what is finished to comparison.json after each.

    Args:
        config: the grid; with `resume`, one of the same budget in the same folder goes on.
        say: called with a line about what is left out, and about each cell before it is trained.

    Yields:
        All that is finished: what an earlier run has left, if any, then after each cell.

    Raises:
        FastWeightsError: something is refused, as by `train`; or nothing of the grid can be.
        SystemExit: the process was told to stop while a stage was trained, and a checkpoint was written first.
    """
    if process_state().num_processes > 1:
        raise FastWeightsError("a comparison trains in one process: run fastweights compare without a launcher")
    inputs: list[str | Path | None] = [resolve_model(config.model), config.data.text]
    check_start(config, inputs)
    cells, left_out = _possible(config)
    for reason, names in left_out.items():
        say(f"left out: {', '.join(names)}: {reason}")
    base = load_model(config.model)
    if isinstance(base, FastWeightsForCausalLM):
        raise FastWeightsError(f"{config.model} is converted already: give the model that it was made from")
    contents = contents_of(base, *load_data(config.training(cells[0]), load_tokenizer(config.model)))
    inputs.append(name_of(base))
    del base
    with begin_run(config, inputs, contents):
        if not config.resume:
            _forget(config)
        known = _finished(config, say)
        results = {cell: known[cell] for cell in cells if cell in known}
        if results:
            yield _written(Grid(config, dict(results), left_out))
        for i, cell in enumerate(cells):
            if cell not in results:
                about = f"rule {cell.rule}, map {cell.feature_map}, window {cell.window}, seed {cell.seed}"
                say(f"{i + 1} of {len(cells)}: {about}")
                results[cell] = _train(config, cell, _teacher(results.values()))
                yield _written(Grid(config, dict(results), left_out))


def _possible(config: GridConfig) -> tuple[list[Cell], dict[str, list[str]]]:
    cells, left_out = [], {}
    for cell in config.cells():
        try:
            config.training(cell)
        except FastWeightsError as error:
            name = f"{cell.rule} {cell.feature_map}, window {cell.window}"
            names = left_out.setdefault(str(error), [])
            names += [] if name in names else [name]
        else:
            cells.append(cell)
    if not cells:
        raise FastWeightsError(f"nothing is left to compare: {'; '.join(left_out)}")
    return cells, left_out


def _train(config: GridConfig, cell: Cell, teacher: Evaluation | None) -> CellResult:
    training = config.training(cell)
    # The folders of a grid are its own, so that what is there and no run is what a kill left before one began.
    begun = (training.output / RUN_FILE).exists()
    made_with = environment()
    try:
        stages = train(replace(training, resume=begun, overwrite=not begun), teacher)
    except DivergedError as error:
        return CellResult(cell, [], str(error), made_with)
    finally:
        gc.collect()  # trainers refer to themselves, and to a model each
    for stage in training.stages:
        drop_all(training.output / stage)
    return CellResult(cell, stages, None, made_with)


def _teacher(results: Iterable[CellResult]) -> Evaluation | None:
    """What the held-out text costs the original model, if a cell has found that out already."""
    return next((result.stages[0].evaluation for result in results if result.stages), None)


def _forget(config: GridConfig) -> None:
    """Have no cell go on from what an earlier grid left."""
    (config.output / GRID_FILE).unlink(missing_ok=True)
    for run in config.output.glob(f"{_CELLS}/{RUN_FILE}"):
        run.unlink()


def _written(grid: Grid) -> Grid:
    write_text(grid.config.output / GRID_FILE, json.dumps(grid.plain(), indent=2) + "\n")
    return grid


def _finished(config: GridConfig, say: Callable[[str], None]) -> dict[Cell, CellResult]:
    """Cells that need not be evaluated again, as they were evaluated in the same way."""
    file = config.output / GRID_FILE
    if not file.exists():
        return {}
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        if _comparable(written["config"]) != _comparable(_config(config)):
            return {}
        results = [_read(entry) for entry in written["cells"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        say(f"{file} cannot be read: what was trained is evaluated again")
        return {}
    return {result.cell: result for result in results}


def _config(config: GridConfig) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(config), default=str))


def _comparable(config: dict) -> dict:
    """Without what may change, and with what was so before a setting came."""
    kept = {name: value for name, value in config.items() if name not in _FREE}
    return kept | {section: added | kept[section] for section, added in ADDED_BY_SECTION.items()}


def _read(entry: dict) -> CellResult:
    cell = Cell(**{name: entry[name] for name in Cell._fields})
    return CellResult(cell, [_stage(stage) for stage in entry["stages"]], entry["diverged"], entry["environment"])


def _stage(entry: dict) -> StageResult:
    parts = entry["parts"] and {name: _evaluation(part) for name, part in entry["parts"].items()}
    return StageResult(**{**entry, "evaluation": _evaluation(entry["evaluation"]), "parts": parts})


def _evaluation(entry: dict) -> Evaluation:
    numbers: dict = {name: math.inf if value is None else value for name, value in entry.items()}
    return Evaluation(**numbers)


def _row(results: list[CellResult]) -> Row:
    cell = results[0].cell
    ended = [result for result in results if result.diverged is None]
    last = [result.stages[-1] for result in ended]
    retentions = [stage.retention for stage in last]
    return Row(
        rule=cell.rule,
        feature_map=cell.feature_map,
        window=cell.window,
        seeds=[result.cell.seed for result in ended],
        diverged=[result.cell.seed for result in results if result.diverged is not None],
        loss=statistics.fmean(stage.evaluation.loss for stage in last) if last else math.inf,
        perplexity=statistics.fmean(stage.evaluation.perplexity for stage in last) if last else math.inf,
        retention=statistics.fmean(retentions) if last else 0.0,
        retention_spread=statistics.stdev(retentions) if len(last) > 1 else None,
        seconds=statistics.fmean(stage.seconds for stage in last) if last else 0.0,
        tokens_per_second=sum(stage.tokens for stage in last) / max(1e-9, sum(stage.seconds for stage in last)),
        parts=_parts([stage.parts for stage in last if stage.parts]),
    )


def _parts(found: list[dict[str, Evaluation]]) -> dict[str, float]:
    names = found[0] if found else ()
    return {
        name: statistics.fmean(math.exp(parts["teacher"].loss - parts[name].loss) for parts in found) for name in names
    }
