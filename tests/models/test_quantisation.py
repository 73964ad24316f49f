"""Quantisers find the projections of converted models and leave gates, factors and Fast Weight Layers as they are."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from fastweights.errors import FastWeightsError
from fastweights.layers.precision import Float32Linear
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import MAKERS, make_llama, random_ids
from tests.models.test_fast_weight_layer import trained
from tests.ops.problems import error

KINDS = {"pure": ConversionConfig(), "hybrid": ConversionConfig(window=8, mix_gate=True)}
BITS_8, BITS_4 = 0.05, 0.5
"""Relative errors of random models' logits that so many bits may make (measured: 0.01 to 0.05, and 0.15 to 0.34)."""


WIDE = {
    "gpt2": {"n_embd": 64, "initializer_range": 0.03},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.03},
}
"""Matrices of at least a block of 64 numbers a row, without which bitsandbytes has no product of four bits on a CPU."""


def make(family: str, kind: str, **changes) -> PreTrainedModel:
    """A model whose gates depend on its input, so that what happens to them is seen."""
    model = MAKERS[family](**{"initializer_range": 0.05, **changes})
    model = trained(model) if kind == "block" else convert(model, KINDS[kind]).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Float32Linear):
                nn.init.normal_(module.weight, std=0.1)
    return model


@pytest.fixture(params=sorted(MAKERS))
def family(request) -> str:
    return request.param


@pytest.fixture(params=[*KINDS, "block"])
def model(family, request):
    return make(family, request.param)


def package(name: str):
    """An optional package; some fail on import on machines that they are not for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)
        return importlib.import_module(name)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """All that multiplies by a matrix and is the base model's, without the head."""
    kinds = (nn.Linear, Conv1D)
    return {
        name: module
        for name, module in model.model.base.named_modules()
        if isinstance(module, kinds) and not isinstance(module, Float32Linear)
    }


@torch.no_grad()
def check(quantised, model, tolerance: float) -> None:
    """Logits are near, generation works, and all that is ours is as it was, bit for bit."""
    ids = random_ids(2, 20)
    expected, found = model(ids).logits, quantised(ids).logits
    assert 0 < error(found, expected) < tolerance
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    assert quantised.generate(ids, attention_mask=torch.ones_like(ids), **arguments).shape == (2, 23)
    ours = dict(quantised.named_parameters())
    names = model.new_parameter_names() + [name for name in ours if "fast_weight_layer" in name]
    assert names
    for name in names:
        assert ours[name].dtype == torch.float32
        assert ours[name].equal(dict(model.named_parameters())[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_dynamic(kind):
    model = make("llama", kind)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for name in matrices(model):
        assert quantised.model.base.get_submodule(name).weight().dtype == torch.qint8, name
    assert quantised.lm_head.weight().dtype == torch.qint8
    check(quantised, model, BITS_8 * 1.5)


@pytest.mark.parametrize("kind", [*KINDS, "block"])
def test_torchao_of_an_object(kind):
    package("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, quantised = make("llama", kind), make("llama", kind)
    quantize_(quantised.model, Int8WeightOnlyConfig())
    for name in matrices(model):
        assert type(quantised.model.base.get_submodule(name).weight).__name__ == "Int8Tensor", name
    check(quantised, model, BITS_8)


def test_torchao_in_four_bits(tmp_path):
    """By its prototype: its other four bits are not for CPUs."""
    package("torchao")
    prototype = pytest.importorskip("torchao.prototype.quantization.int4")
    model = make("llama", "hybrid")
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(prototype.PrototypeInt4WeightOnlyConfig(group_size=32))
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for name in matrices(model):
        assert type(quantised.model.base.get_submodule(name).weight).__name__ == "Int4OpaqueTensor", name
    check(quantised, model, BITS_4)


@pytest.mark.parametrize("kind", [*KINDS, "block"])
def test_torchao_of_a_folder(tmp_path, kind):
    package("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = make("llama", kind)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for name in matrices(model):
        assert type(quantised.model.base.get_submodule(name).weight).__name__ == "Int8Tensor", name
    check(quantised, model, BITS_8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [*KINDS, "block"])
def test_bitsandbytes(family, kind, tmp_path, bits):
    bnb = package("bitsandbytes")
    model = make(family, kind, **WIDE[family])
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    for name in matrices(model):
        part = quantised.model.base.get_submodule(name)
        assert type(part) is kind, name
        assert part.weight.dtype in (torch.int8, torch.uint8)
    check(quantised, model, BITS_8 if bits == 8 else BITS_4)


@torch.no_grad()
def test_a_fast_weight_layer_refuses_a_quantised_head():
    model = torch.ao.quantization.quantize_dynamic(make("llama", "block"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(FastWeightsError, match="leave lm_head out of quantisation") as caught:
        model(random_ids(1, 5))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_fast_weight_layer_beside_a_quantised_model():
    model = make("llama", "block")
    quantised = make("llama", "block")
    quantised.model.base = torch.ao.quantization.quantize_dynamic(model.model.base, {nn.Linear}, dtype=torch.qint8)
    check(quantised, model, BITS_8 * 1.5)


@pytest.mark.parametrize("cast", ["to(bfloat16)", "half", "double"])
def test_casts_leave_what_is_ours(model, cast):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model = {"to(bfloat16)": lambda: model.to(torch.bfloat16), "half": model.half, "double": model.double}[cast]()
    ours = {*model.new_parameter_names(), *(name for name in before if "fast_weight_layer" in name)}
    for name, parameter in model.named_parameters():
        if name in ours and cast != "double":
            assert parameter.dtype == torch.float32, name
            assert parameter.equal(before[name]), name
        else:
            assert parameter.dtype == {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16), name
    with torch.no_grad():
        assert model(random_ids(2, 20)).logits.isfinite().all()


def test_cast_there_and_back_gates_are_the_same():
    model = convert(make_llama())
    rule = model.fast_attentions()[0].rule
    with torch.no_grad():
        nn.init.normal_(rule.key_gate.weight)
    weight = rule.key_gate.weight.detach().clone()
    assert model.bfloat16().float().fast_attentions()[0].rule.key_gate.weight.equal(weight)
