"""LoRA on everything linear: projections, gates and the feed-forward layers; the Fast Weight Layer stays as it is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fastweights.layers.precision import Float32Linear
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import MAKERS, random_ids
from tests.models.test_fast_weight_layer import trained
from tests.ops.problems import error

peft = pytest.importorskip("peft", reason="LoRA is peft's")
KINDS = {"pure": ConversionConfig(), "hybrid": ConversionConfig(window=8)}
RULE_WITH_GATES = ("key_gate", "value_gate")


@pytest.fixture(params=sorted(MAKERS))
def family(request) -> str:
    return request.param


def adapt(model, **settings):
    """With adapters on all linear layers; their second matrices are not 0, as after training."""
    config = peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft, of GPT-2's Conv1D
        adapted = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "block"])
def test_all_linear_layers_learn(family, kind, dtype):
    base = MAKERS[family]()
    model = trained(base) if kind == "block" else convert(base, KINDS[kind])
    adapted = adapt(model.to(dtype))
    ids = random_ids(2, 20)
    adapted(input_ids=ids, labels=ids).loss.backward()
    adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    for layer in range(3):
        for gate in RULE_WITH_GATES:
            assert len([name for name in adapters if f".{layer}." in name and f"rule.{gate}.lora_B" in name]) == 1
    assert not any("fast_weight_layer" in name or "lm_head" in name for name in adapters)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (name in adapters), name
    for name, parameter in adapters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "block"])
def test_merged_it_says_the_same(family, kind):
    base = MAKERS[family]()
    model = trained(base) if kind == "block" else convert(base, KINDS[kind])
    ids = random_ids(2, 20)
    before = model.eval()(ids).logits
    adapted = adapt(model).eval()
    expected = adapted(input_ids=ids).logits
    assert error(expected, before) > 0.01
    merged = adapted.merge_and_unload()
    assert error(merged(ids).logits, expected) <= tolerances.FLOAT32
    gates = [module for name, module in merged.named_modules() if name.endswith(RULE_WITH_GATES)]
    assert len(gates) == 6
    assert all(type(gate) is Float32Linear and gate.weight.dtype == torch.float32 for gate in gates)


@torch.no_grad()
def test_adapters_are_saved_and_loaded(family, tmp_path):
    ids = random_ids(2, 20)
    adapted = adapt(convert(MAKERS[family](), KINDS["hybrid"])).eval()
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(convert(MAKERS[family](), KINDS["hybrid"]), tmp_path).eval()
    assert loaded(input_ids=ids).logits.equal(adapted(input_ids=ids).logits)
