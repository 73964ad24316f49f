import torch

from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.teacher import record_attention
from tests.conftest import random_ids


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


def test_loss_trains_the_converted_layers_alone(base):
    model = convert(base)
    records = record_attention(base, random_ids(2, 20))
    model(attention_records=records).loss.backward()
    inside = {name for name, p in model.named_parameters() if p.grad is not None}
    assert inside
    assert all(".attn." in name or ".self_attn." in name for name in inside)
    assert {name for name in inside if "gate." in name or "scale" in name} == set(model.new_parameter_names())
