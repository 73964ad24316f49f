"""A run goes on from its own past and from no other's."""

import json
from dataclasses import replace

import pytest
import torch

from fastweights.data import load_documents, tokenize
from fastweights.errors import FastWeightsError
from fastweights.models import convert, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, RunConfig, TrainConfig, TransferConfig
from fastweights.training import train
from fastweights.training.blocks import TokenBlocks
from fastweights.training.runs import CHECKPOINT, TRAINER_STATE_FILE, check_stage, clear_stages


@pytest.fixture
def config(tmp_path, model_folder, text_file) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder),
        output=tmp_path / "run",
        data=DataConfig(text=str(text_file), block_size=32),
        transfer=TransferConfig(steps=4),
        finetune=FinetuneConfig(steps=2),
        evaluation=HeldOutConfig(max_tokens=128),
        run=RunConfig(save_every=2),
    )


def test_a_new_run_in_a_used_folder_starts_anew(config, monkeypatch):
    train(config)
    other = replace(config, convert=ConversionConfig(window=8))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastweights.training.trainer.StageTrainer.run", killed)
        with pytest.raises(KeyboardInterrupt):
            train(other)
    train(replace(other, resume=True))
    assert load_model(config.output).config.settings.window == 8


def test_a_new_run_touches_nothing_but_its_own_stages(config):
    others = config.output / "other" / "checkpoint-500"
    others.mkdir(parents=True)
    train(config)
    assert others.is_dir()


def test_a_run_that_is_refused_leaves_the_one_before_it(config):
    train(config)
    before = set(config.output.rglob("*"))
    refused = (
        (replace(config, run=RunConfig(report_to="nonsense")), "report_to"),
        (replace(config, finetune=FinetuneConfig(batch_size=10_000)), "a batch takes 10000"),
        (replace(config, evaluation=HeldOutConfig(context="sliding", stride=64)), "stride is 64"),
        (replace(config, model=str(config.output)), "was given, but|own folder"),
    )
    for other, message in refused:
        with pytest.raises(FastWeightsError, match=message):
            train(other)
    assert set(config.output.rglob("*")) == before
    results = train(replace(config, resume=True, evaluation=HeldOutConfig(max_tokens=64)))
    assert results[-1].evaluation.tokens == 63


def test_reports_may_go_everywhere_or_nowhere(config):
    blocks = TokenBlocks(torch.arange(64), 16)
    for where in ("none", "all", "tensorboard"):
        check_stage(config.transfer, RunConfig(report_to=where), blocks)


def test_tokens_are_those_that_were_read(config, text_file):
    """An epoch of three batches ends with a step of one where a step takes two."""
    blocks = len(TokenBlocks(tokenize(load_documents(config.data), load_tokenizer(config.model)).tokens, 32))
    batch = blocks * 3 // 10  # a twentieth is held out
    steps = {"batch_size": batch, "gradient_accumulation": 2}
    config = replace(config, transfer=TransferConfig(steps=4, **steps), finetune=FinetuneConfig(steps=1, **steps))
    results = {result.stage: result.tokens for result in train(config)}
    assert results == {"teacher": 0, "converted": 0, "transfer": 6 * batch * 32, "finetune": 8 * batch * 32}
    assert {r.stage: r.tokens for r in train(replace(config, resume=True))} == results


def test_a_run_resumes_only_with_its_own_config(config):
    train(config)
    before = (config.output / "run.json").read_text()
    with pytest.raises(FastWeightsError, match=r"started with convert.window 0 and not 8"):
        train(replace(config, convert=ConversionConfig(window=8), resume=True))
    assert (config.output / "run.json").read_text() == before
    train(replace(config, run=RunConfig(save_every=3), resume=True))  # how often to save is free
    (config.output / "run.json").write_text('{"stage": "Tra')  # killed while writing it
    train(replace(config, run=RunConfig(save_every=3), resume=True))
    assert json.loads((config.output / "run.json").read_text())["config"]["run"]["save_every"] == 3


def test_settings_of_a_conversion_that_is_over_are_refused(config, tmp_path, model_folder):
    convert(model_folder).save_pretrained(tmp_path / "converted")
    load_tokenizer(str(model_folder)).save_pretrained(tmp_path / "converted")
    with pytest.raises(FastWeightsError, match=r"convert was given, but .* is converted already"):
        train(replace(config, model=str(tmp_path / "converted"), convert=ConversionConfig(window=8)))


def test_a_text_that_has_changed_is_read_anew(config, tmp_path, text_file):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    config = replace(config, data=replace(config.data, text=str(text)), evaluation=HeldOutConfig(max_tokens=None))
    before = train(config)[-1].evaluation.tokens
    text.write_text(text_file.read_text() * 2)
    assert train(config)[-1].evaluation.tokens == pytest.approx(2 * before, abs=2)


def test_only_what_a_run_goes_on_from_is_cleared(tmp_path):
    kept = [tmp_path / "transfer" / "model.safetensors", tmp_path / "other" / "finished", tmp_path / "checkpoint-1"]
    gone = [tmp_path / "transfer" / "finished", tmp_path / "transfer" / "checkpoint-2"]
    for path in (*kept, *gone):
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if "checkpoint" in path.name else path.touch()
    clear_stages(tmp_path, ("transfer", "finetune"))
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


def test_files_are_those_of_the_trainer():
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    assert (TRAINER_STATE_FILE, CHECKPOINT) == (TRAINER_STATE_NAME, PREFIX_CHECKPOINT_DIR)
