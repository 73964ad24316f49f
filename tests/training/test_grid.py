"""A grid of trainings: each is the `train` that it says, none is done twice, and what is finished is on the disk."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from fastweights.errors import DivergedError, FastWeightsError
from fastweights.evaluation.parts import PARTS
from fastweights.models import convert
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import SharedConversion
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.grid import Cell, GridConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, RunConfig, TransferConfig
from fastweights.training import grid as module
from fastweights.training import train
from fastweights.training.grid import train_grid
from fastweights.training.trainer import StageTrainer


@pytest.fixture
def config(tmp_path, model_folder, text_file):
    return GridConfig(
        model=str(model_folder),
        output=tmp_path / "grid",
        rules=("decay", "add"),
        feature_maps=("identity", "elu+1"),
        seeds=(0,),
        convert=SharedConversion(gate_bias=(-2.0, 6.0), sinks=2, window_dtype="int8"),
        data=DataConfig(text=str(text_file), block_size=32),
        transfer=TransferConfig(steps=2),
        finetune=FinetuneConfig(steps=2),
        evaluation=HeldOutConfig(max_tokens=200, parts_tokens=100),
        run=RunConfig(save_every=1),
    )


def finished(config, say=lambda line: None):
    """The grid at its end."""
    return list(train_grid(config, say))[-1]


def written(config):
    return json.loads((config.output / "comparison.json").read_text())


def counted(monkeypatch):
    """Names of the folders of all trainings from here on."""
    names = []

    def noted(config, teacher=None):
        names.append(config.output.name)
        return train(config, teacher)

    monkeypatch.setattr(module, "train", noted)
    return names


def test_each_cell_is_the_train_of_its_config(config, tmp_path):
    config = replace(config, rules=("decay",), feature_maps=("elu+1",), windows=(0, 16), seeds=(1, 0))
    grid = finished(config)
    assert list(grid.results) == [Cell("decay", "elu+1", window, seed) for seed in (1, 0) for window in (0, 16)]
    for cell in (Cell("decay", "elu+1", 0, 1), Cell("decay", "elu+1", 16, 0)):
        alone = train(replace(config.training(cell), output=tmp_path / f"alone-{cell.name}"))
        assert [stage.stage for stage in alone] == ["teacher", "converted", "transfer", "finetune"]
        for stage, other in zip(grid.results[cell].stages, alone, strict=True):
            assert stage.tokens == other.tokens
            assert stage.evaluation.loss == pytest.approx(other.evaluation.loss, rel=1e-6)
            assert (stage.parts or {}).keys() == (other.parts or {}).keys()
        assert bool(grid.results[cell].stages[-1].parts) == bool(cell.window)
    assert len({result.stages[-1].evaluation.loss for result in grid.results.values()}) == 4
    assert not list(config.output.rglob("checkpoint-*"))


def test_settings_go_to_those_that_have_them(config):
    add, hybrid = (config.training(Cell(*cell, 0)) for cell in (("add", "elu+1", 0), ("decay", "identity", 16)))
    assert (add.convert.gate_bias, add.convert.sinks) == ((2.0, 6.0), None)
    assert (add.convert.window_dtype, hybrid.convert.window_dtype) == ("auto", "int8")
    assert (hybrid.convert.gate_bias, hybrid.convert.sinks, hybrid.convert.window) == ((-2.0, 6.0), 2, 16)


def test_rows_are_means_over_seeds_and_the_best_is_first(config):
    grid = finished(replace(config, rules=("add",), feature_maps=("identity",), windows=(0, 16), seeds=(0, 1)))
    assert len(grid.ranking) == 2
    assert [row.retention for row in grid.ranking] == sorted((row.retention for row in grid.ranking), reverse=True)
    for row in grid.ranking:
        cells = [Cell(row.rule, row.feature_map, row.window, seed) for seed in (0, 1)]
        first, second = (grid.results[cell].stages[-1] for cell in cells)
        assert row.loss == pytest.approx((first.evaluation.loss + second.evaluation.loss) / 2)
        assert row.retention == pytest.approx((first.retention + second.retention) / 2)
        assert row.retention_spread == pytest.approx(abs(first.retention - second.retention) / math.sqrt(2))
        assert row.tokens_per_second == pytest.approx(2 * first.tokens / (first.seconds + second.seconds))
        assert first.seconds > 0
        assert list(row.parts) == (["all", *PARTS] if row.window else [])
    data = written(grid.config)
    assert [entry["retention"] for entry in data["ranking"]] == [row.retention for row in grid.ranking]
    assert data["config"]["convert"]["gate_bias"] == [-2.0, 6.0]
    assert {"commit", "torch", "cpu", "date", "threads"} <= data["cells"][0]["environment"].keys()


def test_a_killed_grid_goes_on_and_computes_nothing_twice(config, monkeypatch):
    config = replace(config, rules=("add",), feature_maps=("identity", "elu+1", "relu"))
    run, steps = StageTrainer.training_step, [0]

    def killed(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == 7:  # the third step of the second cell: the first of its second stage
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            finished(config)
    assert len(written(config)["cells"]) == 1
    before = written(config)["cells"][0]

    trained, names = [0], counted(monkeypatch)

    def noted(self, *args, **kwargs):
        trained[0] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", noted)
    resumed = replace(config, resume=True)
    grid = finished(resumed)
    assert names == ["add-elu+1-w0-s0", "add-relu-w0-s0"]
    assert trained[0] == 2 + 4
    assert written(config)["cells"][0] == before

    names.clear()
    again = list(train_grid(resumed))
    assert names == []
    assert [row.loss for row in again[-1].ranking] == [row.loss for row in grid.ranking]
    shutil.rmtree(config.output)
    whole = finished(config)
    assert [row.loss for row in whole.ranking] == pytest.approx([row.loss for row in grid.ranking], rel=1e-6)


def test_a_grid_from_before_a_setting_came_is_not_evaluated_again(config, monkeypatch):
    small = replace(config, rules=("add",), feature_maps=("elu+1",))
    finished(small)
    earlier = written(config)
    assert earlier["config"]["convert"].pop("mix_gate") is False
    assert earlier["config"]["finetune"].pop("vocabulary") == "all"
    (config.output / "comparison.json").write_text(json.dumps(earlier))
    names = counted(monkeypatch)
    finished(replace(small, resume=True))
    assert names == []


def test_a_grid_may_grow_and_its_budget_may_not(config, monkeypatch):
    small = replace(config, rules=("add",))
    finished(small)
    names = counted(monkeypatch)
    grid = finished(replace(small, rules=("add", "decay"), feature_maps=("elu+1",), resume=True))
    assert names == ["decay-elu+1-w0-s0"]
    assert [cell.rule for cell in grid.results] == ["add", "decay"]
    with pytest.raises(FastWeightsError, match=r"started with transfer.steps 2 and not 3.*--overwrite"):
        finished(replace(small, transfer=TransferConfig(steps=3), resume=True))


def test_another_evaluation_is_made_without_training(config, monkeypatch):
    small = replace(config, rules=("add",), feature_maps=("elu+1",))
    finished(small)
    monkeypatch.setattr(StageTrainer, "training_step", lambda *_: pytest.fail("trained"))
    grid = finished(replace(small, evaluation=HeldOutConfig(max_tokens=100), resume=True))
    assert next(iter(grid.results.values())).stages[-1].evaluation.tokens == 99
    (config.output / "comparison.json").write_text('{"cells": [')
    said = []
    finished(replace(small, evaluation=HeldOutConfig(max_tokens=100), resume=True), said.append)
    assert "cannot be read" in said[0]


def test_overwriting_starts_anew(config, monkeypatch):
    small = replace(config, rules=("add",))
    finished(small)
    names = counted(monkeypatch)
    again = replace(small, overwrite=True)
    next(train_grid(again))
    assert len(written(small)["cells"]) == 1
    steps, run = [0], StageTrainer.training_step

    def noted(self, *args, **kwargs):
        steps[0] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", noted)
    finished(replace(small, resume=True))
    assert names == ["add-identity-w0-s0", "add-elu+1-w0-s0"]
    assert steps[0] == 4  # nothing of the first grid was gone on from


def test_the_teacher_is_evaluated_once(config, monkeypatch):
    from fastweights.training import pipeline

    evaluated, evaluate = [], pipeline.evaluate

    def noted(model, *args, **kwargs):
        evaluated.append(type(model).__name__)
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(pipeline, "evaluate", noted)
    grid = finished(replace(config, rules=("add",)))
    assert evaluated.count("GPT2LMHeadModel") == 1
    teachers = {result.stages[0].evaluation for result in grid.results.values()}
    assert len(teachers) == 1


def test_a_training_that_diverges_is_last_and_stops_nothing(config, monkeypatch):
    def diverges(config, teacher=None):
        if config.convert.rule == "decay" and config.run.seed == 1:
            raise DivergedError("training stopped at step 1: the loss is nan")
        return train(config, teacher)

    monkeypatch.setattr(module, "train", diverges)
    config = replace(config, feature_maps=("identity",), seeds=(0, 1))
    grid = finished(config)
    last = grid.ranking[-1]
    assert (last.rule, last.seeds, last.diverged) == ("decay", [0], [1])
    assert "the loss is nan" in written(config)["cells"][2]["diverged"]
    names = counted(monkeypatch)
    assert finished(replace(config, resume=True)).ranking == grid.ranking
    assert names == []
    monkeypatch.setattr(module, "train", diverges)
    none = finished(replace(config, rules=("decay",), seeds=(1,), overwrite=True))
    assert none.ranking[0].loss == math.inf
    assert written(config)["ranking"][0]["loss"] is None


def test_what_cannot_be_is_left_out_with_its_reason(config):
    said = []
    grid = finished(replace(config, convert=SharedConversion(normaliser=True)), said.append)
    assert [tuple(cell) for cell in grid.results] == [("add", "elu+1", 0, 0)]
    assert said[0] == "left out: decay identity, window 0, decay elu+1, window 0: " + next(iter(grid.left_out))
    assert "rule decay has no normaliser" in said[0]
    assert "weights may sum to 0" in said[1]
    assert written(config)["left_out"] == grid.left_out
    with pytest.raises(FastWeightsError, match="nothing is left to compare: rule decay has no normaliser"):
        finished(replace(config, rules=("decay",), convert=SharedConversion(normaliser=True), overwrite=True))


def test_a_model_that_is_converted_already_is_refused(config, tmp_path, model_folder):
    convert(model_folder).save_pretrained(tmp_path / "converted")
    load_tokenizer(str(model_folder)).save_pretrained(tmp_path / "converted")
    with pytest.raises(FastWeightsError, match="is converted already"):
        finished(replace(config, model=str(tmp_path / "converted")))
    assert not config.output.exists()
