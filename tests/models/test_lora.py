from __future__ import annotations

import sys

import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.models import convert
from fastweights.models.lora import add_lora
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama, random_ids

TYPES = ["full_attention", "hybrid_sliding", "linear_attention"]


@pytest.fixture(params=[make_gpt2, make_llama])
def model(request):
    return convert(request.param(), ConversionConfig(layer_types=TYPES, window=8)).eval()


def randomise(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


@torch.no_grad()
def test_it_is_nothing_at_first_and_stands_beside_converted_attention_alone(model):
    ids = random_ids(2, 30)
    before, new = model(ids).logits, set(model.new_parameter_names())
    add_lora(model, 2)
    assert torch.equal(model(ids).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert trained == new | lora
    attention = [name for name, module in model.named_modules() if module in model.fast_attentions()]
    assert all(name.startswith(tuple(attention)) for name in lora)
    assert len(lora) == 2 * 2 * (2 if model.config.base.model_type == "gpt2" else 4)


def test_it_is_added_once(model):
    add_lora(model, 2)
    randomise(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_lora(model, 2)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(FastWeightsError, match="lora_rank is 3, and the adapter to train on has 2"):
        add_lora(model, 3)


def test_without_peft_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FastWeightsError, match=r"pip install 'fastweights\[lora\]'"):
        add_lora(model, 2)
