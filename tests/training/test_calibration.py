"""Where conversions start."""

import math
from dataclasses import replace

import pytest
import torch

from fastweights.models import convert, load_model
from fastweights.models.conversion import rest_on_windows
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, TrainConfig, TransferConfig
from fastweights.training import train
from fastweights.training.blocks import TokenBlocks
from fastweights.training.calibration import SHARES, calibrate, fit_layers, is_fresh
from fastweights.training.next_token import next_token_loss
from fastweights.training.teacher import record_attention
from tests.conftest import make_gpt2, make_llama, random_ids


@torch.no_grad()
def test_the_fit_finds_the_best_factors(base):
    """No small change of any factor brings a layer nearer to the teacher's output."""
    records = record_attention(base, random_ids(2, 40))
    for settings in (ConversionConfig(), ConversionConfig(window=8)):
        model = convert(base, settings)
        before = model.reproduction_errors(records)
        fit_layers(model, records)
        best = model.reproduction_errors(records)
        assert (best < before).all()
        assert (best < 1.01).all()  # at worst as good as saying nothing
        for layer in model.fast_attentions():
            for scale in filter(lambda x: x is not None, (layer.fast_scale, layer.window_scale)):
                for step in (-0.05, 0.05):
                    kept = scale[0].clone()
                    scale[0] *= 1 + step
                    assert model.reproduction_errors(records)[layer.layer_idx] >= best[layer.layer_idx] - 1e-4
                    scale[0] = kept


@pytest.fixture
def blocks():
    return TokenBlocks(random_ids(1, 16 * 32)[0], 32, [100, 16 * 32 - 100])


@torch.no_grad()
def loss_of(model, blocks):
    """Of the blocks that calibration takes the loss of."""
    chosen = [blocks[i * len(blocks) // 8] for i in (1, 3, 5, 7)]
    logits = [
        model(input_ids=block["input_ids"][None], position_ids=block["position_ids"][None]).logits for block in chosen
    ]
    losses = [next_token_loss(x, block["labels"][None]) for x, block in zip(logits, chosen, strict=True)]
    return torch.stack(losses).mean().item()


def window_alone(model):
    for layer in model.fast_attentions():
        layer.fast_scale.data.zero_()
        if layer.window_scale is not None:
            layer.window_scale.data.fill_(1)
    return model


@pytest.mark.parametrize("settings", [{}, {"window": 8}, {"window": 8, "positions": "drop"}], ids=str)
def test_no_conversion_starts_below_its_window_alone(base, blocks, settings):
    model = convert(base, ConversionConfig(**settings)).train()
    assert is_fresh(model)
    assert rest_on_windows(model) == ("window" in settings)
    assert is_fresh(model)
    share = calibrate(model, base, blocks)
    assert model.training
    model.eval()
    assert share in SHARES
    assert not is_fresh(model)
    start = loss_of(model, blocks)
    assert start <= loss_of(window_alone(model), blocks) * 1.001


def test_the_start_is_where_the_loss_is_lowest(blocks, monkeypatch):
    """On any of the shares, and at the factors that this one says."""
    losses = iter([5.0, 4.0, 3.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr("fastweights.training.calibration._loss", lambda *_: next(losses))
    base = make_llama()
    model, fitted = (convert(base, ConversionConfig(window=8)) for _ in range(2))
    share = calibrate(model, base, blocks)
    assert share == SHARES[3]
    ids = torch.stack([blocks[i]["input_ids"] for i in (0, 4, 8, 12)])
    fit_layers(fitted, record_attention(base, ids))
    for layer, end in zip(model.fast_attentions(), fitted.fast_attentions(), strict=True):
        torch.testing.assert_close(layer.fast_scale, share * end.fast_scale)
        torch.testing.assert_close(layer.window_scale, 1 + share * (end.window_scale - 1))


@pytest.mark.parametrize(("second", "expected"), [(2.001, SHARES[1]), (2.003, 0.0)])
def test_fast_weights_start_at_nothing_only_where_anything_costs_something(blocks, monkeypatch, second, expected):
    losses = iter([2.0, second, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf])
    monkeypatch.setattr("fastweights.training.calibration._loss", lambda *_: next(losses))
    base = make_gpt2()
    model = convert(base, ConversionConfig(window=8))
    assert calibrate(model, base, blocks) == expected


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 8])
def test_at_a_factor_of_one_each_head_is_as_large_as_its_share_of_the_teachers_output(blocks, window):
    """Whatever the size of the sums, so that no optimizer's step is large beside a factor."""
    base = make_gpt2()
    model = convert(base, ConversionConfig(window=window))
    ids = torch.stack([blocks[i]["input_ids"] for i in (0, 4, 8, 12)])
    records = record_attention(base, ids)
    for seen in (1.0, 30.0):
        for layer in model.fast_attentions():
            layer.rule.key_gate.bias.fill_(seen)
        fit_layers(model, records)
        for layer, record in zip(model.fast_attentions(), records, strict=True):
            bias = layer.output(torch.zeros(1, 1, 32))
            fast, _ = layer.read(record.inputs)
            for head in range(layer.heads):
                alone = torch.zeros_like(fast)
                alone[:, :, head] = fast[:, :, head] * layer.fast_unit[head]
                size = (layer.output(alone.flatten(-2)) - bias).norm()
                assert size.item() == pytest.approx((record.output - bias).norm().item() / layer.heads**0.5, rel=1e-4)


def test_factors_learn_from_nothing_and_gates_once_they_have_moved(base, blocks):
    model = window_alone(convert(base, ConversionConfig(window=8)))
    layer = model.fast_attentions()[0]
    gates = [parameter for name, parameter in layer.named_parameters() if "gate" in name]
    for factor in (0.0, 0.01):
        layer.fast_scale.data.fill_(factor)
        model.zero_grad()
        next_token_loss(model(input_ids=random_ids(2, 32)).logits, random_ids(2, 32)).backward()
        assert layer.fast_scale.grad.abs().min() > 0
        assert any(bool(gate.grad.any()) for gate in gates) == (factor > 0)


@pytest.fixture
def config(tmp_path, model_folder, text_file):
    return TrainConfig(
        model=str(model_folder),
        output=tmp_path / "run",
        stage="transfer",
        convert=ConversionConfig(window=8),
        data=DataConfig(text=str(text_file), block_size=32),
        transfer=TransferConfig(steps=1, learning_rate=1e-9, new_learning_rate=1e-9),
        evaluation=HeldOutConfig(max_tokens=256),
    )


def test_a_run_shows_where_it_started(config):
    teacher, converted, trained = train(config)
    assert [row.stage for row in (teacher, converted, trained)] == ["teacher", "converted", "transfer"]
    assert converted.evaluation.loss == pytest.approx(trained.evaluation.loss, abs=1e-3)


def test_calibration_can_be_left_out(config):
    uncalibrated = train(replace(config, transfer=replace(config.transfer, calibrate=False)))
    assert is_fresh_but_for_rounding(load_model(config.output))
    calibrated = train(replace(config, overwrite=True))
    assert calibrated[1].evaluation.loss < uncalibrated[1].evaluation.loss


def test_finetune_calibrates_a_fresh_conversion_and_no_other(config, model_folder, tmp_path, tokenizer):
    fresh = convert(load_model(model_folder), config.convert)
    rest_on_windows(fresh)
    fresh.save_pretrained(tmp_path / "fresh")
    tokenizer.save_pretrained(tmp_path / "fresh")
    nothing = FinetuneConfig(steps=1, learning_rate=1e-9, new_learning_rate=1e-9)
    stage = {"stage": "finetune", "finetune": nothing, "transfer": TransferConfig(), "convert": ConversionConfig()}
    finetune = replace(config, **stage, model=str(tmp_path / "fresh"))
    assert [row.stage for row in train(finetune)] == ["teacher", "converted", "finetune"]
    started = load_model(config.output)
    assert not is_fresh_but_for_rounding(started)
    again = replace(finetune, model=str(config.output), output=tmp_path / "again")
    assert [row.stage for row in train(again)] == ["teacher", "finetune"]
    for a, b in zip(started.fast_attentions(), load_model(again.output).fast_attentions(), strict=True):
        torch.testing.assert_close(a.fast_scale, b.fast_scale, atol=1e-6, rtol=0)


def is_fresh_but_for_rounding(model):
    """After a step at a learning rate of next to nothing."""
    return all((layer.fast_scale - 1).abs().max() < 1e-6 for layer in model.fast_attentions())


@torch.no_grad()
def test_what_positions_added_to_sinks_is_made_up_for():
    """On average over the queries that have lost a sink from their window."""
    base = make_gpt2()
    model = convert(base, ConversionConfig(window=8, sinks=2, positions="drop"))
    records = record_attention(base, random_ids(2, 40), positions="drop")
    fit_layers(model, records)
    layer, record = model.fast_attentions()[1], records[1]
    with_positions, without = (layer.project(x)[:2] for x in (record.teacher_inputs, record.inputs))
    for sink in (0, 1):
        added = [torch.einsum("bthd,bhd->bth", q[:, sink + 8 :], k[:, sink]) for q, k in (with_positions, without)]
        lost = layer.scaling * (added[0] - added[1]).mean((0, 1))
        torch.testing.assert_close(layer.window_bias[:, 8 + sink], lost, rtol=1e-4, atol=1e-5)
    fit_layers(model, record_attention(base, random_ids(2, 6), positions="drop"))  # no query has lost one
    assert not layer.window_bias[:, 8:].any()
