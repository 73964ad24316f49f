"""What a run says of the model that it made."""

import json
from dataclasses import replace

import pytest

from fastweights.data import load_documents, tokenize
from fastweights.evaluation.parts import PARTS, evaluate_parts
from fastweights.models import load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import EvaluationConfig, HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, TrainConfig, TransferConfig
from fastweights.training import train
from fastweights.training.pipeline import _without_the_end


@pytest.fixture
def config(tmp_path, model_folder, text_file):
    return TrainConfig(
        model=str(model_folder),
        output=tmp_path / "run",
        convert=ConversionConfig(window=8),
        data=DataConfig(text=str(text_file), block_size=32),
        transfer=TransferConfig(steps=2),
        finetune=FinetuneConfig(steps=2),
        evaluation=HeldOutConfig(max_tokens=400, parts_tokens=200),
    )


def test_the_last_result_of_a_hybrid_run_has_its_parts(config):
    results = train(config)
    assert [bool(result.parts) for result in results] == [False, False, False, True]
    written = json.loads((config.output / "results.json").read_text())
    assert written[-1]["parts"]["window alone"]["loss"] == results[-1].parts["window alone"].loss
    tokenizer = load_tokenizer(config.model)
    held_out = tokenize(_without_the_end(load_documents(config.data))[1], tokenizer)
    expected = evaluate_parts(
        load_model(config.output),
        load_model(config.model),
        held_out,
        block_size=32,
        config=EvaluationConfig(max_tokens=200),
    )
    assert list(results[-1].parts) == ["all", *PARTS]
    for name, part in results[-1].parts.items():
        assert part.tokens == 199
        assert part.loss == pytest.approx(expected[name].loss, rel=1e-5)
    resumed = train(replace(config, resume=True))
    assert resumed[-1].parts == results[-1].parts
    few = train(replace(config, resume=True, evaluation=HeldOutConfig(max_tokens=100, parts_tokens=200)))
    assert few[-1].parts["all"] == few[-1].evaluation


def test_other_runs_have_none(config):
    for changed in (
        replace(config, convert=ConversionConfig()),
        replace(config, evaluation=replace(config.evaluation, parts_tokens=0), overwrite=True),
    ):
        assert all(result.parts is None for result in train(changed))
