import torch

from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import TrainConfig, TransferConfig
from fastweights.training import train
from fastweights.training.teacher import record_attention
from fastweights.training.transfer import calibrate
from tests.conftest import make_gpt2, random_ids


@torch.no_grad()
def test_records_are_what_the_layers_see(base):
    """Fed with its own records, a layer that kept its attention repeats its output."""
    ids = random_ids(2, 20)
    records = record_attention(base, ids)
    assert len(records) == 3
    model = convert(base, ConversionConfig(window=16, sinks=4))
    for layer in model.fast_attentions():
        layer.fast_scale.zero_()
    assert (model.reproduction_errors(records) < 1e-8).all()


@torch.no_grad()
def test_calibration_finds_the_best_scales(base):
    """No small change of any scale brings a layer nearer to the teacher's output."""
    records = record_attention(base, random_ids(2, 40))
    for settings in (ConversionConfig(), ConversionConfig(window=8)):
        model = convert(base, settings)
        before = model.reproduction_errors(records)
        calibrate(model, records)
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


@torch.no_grad()
def test_what_positions_added_to_sinks_is_made_up_for():
    """On average over the queries that have lost a sink from their window."""
    base = make_gpt2()
    model = convert(base, ConversionConfig(window=8, sinks=2, positions="drop"))
    records = record_attention(base, random_ids(2, 40), positions="drop")
    calibrate(model, records)
    layer, record = model.fast_attentions()[1], records[1]
    with_positions, without = (layer.project(x)[:2] for x in (record.teacher_inputs, record.inputs))
    for sink in (0, 1):
        added = [torch.einsum("bthd,bhd->bth", q[:, sink + 8 :], k[:, sink]) for q, k in (with_positions, without)]
        lost = layer.scaling * (added[0] - added[1]).mean((0, 1))
        torch.testing.assert_close(layer.window_bias[:, 8 + sink], lost, rtol=1e-4, atol=1e-5)
    calibrate(model, record_attention(base, random_ids(2, 6), positions="drop"))  # no query has lost one
    assert not layer.window_bias[:, 8:].any()


def test_loss_trains_the_converted_layers_alone(base):
    model = convert(base)
    records = record_attention(base, random_ids(2, 20))
    model(attention_records=records).loss.backward()
    inside = {name for name, p in model.named_parameters() if p.grad is not None}
    assert inside
    assert all(".attn." in name or ".self_attn." in name for name in inside)
    assert {name for name in inside if "gate." in name or "scale" in name} == set(model.new_parameter_names())


def test_calibration_can_be_left_out(tmp_path, model_folder, text_file, monkeypatch):
    calibrated = []
    monkeypatch.setattr("fastweights.training.transfer.calibrate", lambda *_: calibrated.append(True))
    for wanted in (False, True):
        train(
            TrainConfig(
                model=str(model_folder),
                output=tmp_path / str(wanted),
                stage="transfer",
                data=DataConfig(text=str(text_file), block_size=32),
                transfer=TransferConfig(steps=1, calibrate=wanted),
                evaluation=HeldOutConfig(max_tokens=64),
            )
        )
        assert bool(calibrated) == wanted
