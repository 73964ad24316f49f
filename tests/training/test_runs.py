"""A run goes on from its own past and from no other's."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastweights.data import load_documents, tokenize
from fastweights.errors import FastWeightsError
from fastweights.files import LOCK_FILE, only_run, save_model
from fastweights.models import convert, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, PretrainConfig, RunConfig, TrainConfig, TransferConfig
from fastweights.training import train
from fastweights.training.blocks import TokenBlocks
from fastweights.training.checkpoints import CHECKPOINT
from fastweights.training.pretrain import pretrain
from fastweights.training.runs import TRAINER_STATE_FILE, check_stage


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
    other = replace(config, convert=ConversionConfig(window=8), overwrite=True)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastweights.training.trainer.StageTrainer.run", killed)
        with pytest.raises(KeyboardInterrupt):
            train(other)
    train(replace(other, resume=True, overwrite=False))
    assert load_model(config.output).config.settings.window == 8


def test_a_new_run_touches_nothing_but_its_own_stages(config):
    others = config.output / "other" / "checkpoint-500"
    others.mkdir(parents=True)
    train(replace(config, overwrite=True))
    assert others.is_dir()


def test_a_run_that_is_refused_leaves_the_one_before_it(config):
    train(config)
    before = set(config.output.rglob("*"))
    refused = (
        (replace(config, run=RunConfig(report_to="nonsense")), "report_to"),
        (replace(config, finetune=FinetuneConfig(batch_size=10_000)), "a batch takes 10000"),
        (replace(config, evaluation=HeldOutConfig(context="sliding", stride=64)), "stride is 64"),
        (replace(config, model=str(config.output)), "which is read"),
        (replace(config, data=replace(config.data, text=str(config.output.parent))), "lies in"),
        (replace(config, teacher=str(config.output / "transfer")), "written to"),
    )
    for other, message in refused:
        with pytest.raises(FastWeightsError, match=message):
            train(replace(other, overwrite=True))
    assert set(config.output.rglob("*")) == before
    results = train(replace(config, resume=True, evaluation=HeldOutConfig(max_tokens=64)))
    assert results[-1].evaluation.tokens == 63


def test_reports_go_where_something_takes_them(config, monkeypatch):
    blocks = TokenBlocks(torch.arange(64), 16)
    for where in ("none", "all"):
        check_stage(config.transfer, RunConfig(report_to=where), blocks)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    for where, message in (("tensorboard", "requires tensorboard to be installed"), ("odd", "not supported")):
        with pytest.raises(FastWeightsError, match=message):
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
    assert json.loads((config.output / "run.json").read_text())["config"]["run"]["save_every"] == 3


def test_a_run_from_before_a_setting_came_goes_on_as_it_was(config):
    train(config)
    file = config.output / "run.json"
    run = json.loads(file.read_text())
    assert run["config"]["convert"].pop("value_map") is False
    assert run["config"]["finetune"].pop("vocabulary") == "all"
    file.write_text(json.dumps(run))
    train(replace(config, resume=True))
    with pytest.raises(FastWeightsError, match=r"convert.value_map False and not True"):
        train(replace(config, convert=replace(config.convert, value_map=True), resume=True))


def test_a_run_resumes_only_on_what_it_began_with(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One bottle of beer on the wall.\n" * 100)
    config = replace(config, data=replace(config.data, text=str(text)))
    train(config)
    again = replace(config, resume=True)
    train(again)
    text.write_text("Two bottles of beer on the wall.\n" * 100)
    with pytest.raises(FastWeightsError, match="the text is not what it was"):
        train(again)
    text.write_text("One bottle of beer on the wall.\n" * 100)
    train(again)


@pytest.mark.parametrize("content", ['{"stage": "Tra', "[]", "", "\udcff", "[" * 10**5])
def test_a_run_whose_config_is_lost_is_refused(config, content):
    config.output.mkdir()
    (config.output / "run.json").write_text(content, errors="surrogateescape")
    before = (config.output / "run.json").read_bytes()
    with pytest.raises(FastWeightsError, match=r"run\.json cannot be read.*--overwrite"):
        train(replace(config, resume=True))
    assert (config.output / "run.json").read_bytes() == before


def test_an_output_that_is_in_use_is_refused_before_anything_is_loaded(config, monkeypatch):
    monkeypatch.setattr("fastweights.training.pipeline.load_tokenizer", lambda *_: pytest.fail("loaded"))
    config.output.mkdir()
    (config.output / "book.txt").write_text("mine")
    pretrained = PretrainConfig(output=config.output)
    for run, other in ((train, config), (pretrain, pretrained)):
        with pytest.raises(FastWeightsError, match=r"has book\.txt in it.*--overwrite"):
            run(other)
        with pytest.raises(FastWeightsError, match=r"has book\.txt in it and no run\.json.*--overwrite"):
            run(replace(other, resume=True))
    (config.output / "run.json").write_text("{}")
    with pytest.raises(FastWeightsError, match=r"has a run in it.*--resume.*--overwrite"):
        train(config)


def test_resume_begins_where_nothing_was_begun(config):
    assert train(replace(config, resume=True))[-1].stage == "finetune"


def test_the_model_that_was_converted_is_never_written_over(config, tmp_path, model_folder):
    base, converted = tmp_path / "base", tmp_path / "converted"
    shutil.copytree(model_folder, base)
    save_model(convert(base), load_tokenizer(str(base)), converted)
    with pytest.raises(FastWeightsError, match="which is read"):
        train(replace(config, model=str(converted), output=base, overwrite=True))
    assert {path.name for path in base.iterdir()} == {path.name for path in model_folder.iterdir()}


def test_a_folder_takes_one_run_at_a_time(config, model_folder, text_file):
    """Two real processes: this one writes there, and another would like to."""
    command = [sys.executable, "-m", "fastweights", "train", "--overwrite", "--output", config.output]
    command += ["--model", model_folder, "--data.text", text_file, "--data.block-size", "32"]
    with only_run(config.output):
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "another process is writing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert {path.name for path in config.output.iterdir()} == {LOCK_FILE}


def test_a_full_disk_keeps_the_results_before_it(config, monkeypatch):
    train(config)
    before = (config.output / "results.json").read_text()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FastWeightsError, match="no space left"):
        train(replace(config, resume=True))
    assert (config.output / "results.json").read_text() == before


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
    assert train(replace(config, overwrite=True))[-1].evaluation.tokens == pytest.approx(2 * before, abs=2)


def test_files_are_those_of_the_trainer():
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    assert (TRAINER_STATE_FILE, CHECKPOINT) == (TRAINER_STATE_NAME, PREFIX_CHECKPOINT_DIR)
