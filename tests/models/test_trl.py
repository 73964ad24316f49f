"""TRL's SFTTrainer trains converted models like any other, from an object and from a saved folder."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from datasets import Dataset

from fastweights.embedded import byte_tokenizer
from fastweights.models import add_fast_weight_layer, convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from tests.conftest import MAKERS

KINDS = {"pure": ConversionConfig(), "hybrid": ConversionConfig(window=8)}
PROJECTIONS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "k_proj", "v_proj", "o_proj"]}
WAYS = {
    "padded": {"max_length": 64},
    "packed": {"max_length": 64, "packing": True},
    "padding free": {"max_length": None, "padding_free": True},
}


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("peft", reason="LoRA is peft's")
    return pytest.importorskip("trl", reason="SFTTrainer is TRL's")


@pytest.fixture(params=sorted(MAKERS))
def family(request) -> str:
    return request.param


@pytest.fixture(params=sorted(KINDS))
def model(family, request):
    return convert(MAKERS[family](), KINDS[request.param])


def make_trainer(trl, model, tmp_path, targets=None, **settings):
    """Of three steps on a few lines of text; LoRA on `targets`, or everything where there are none."""
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    lora = None
    if targets is not None:
        from peft import LoraConfig

        lora = LoraConfig(target_modules=targets, r=4)
    texts = [f"{i} bottles of beer on the wall" + "!" * i for i in range(12)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft, of GPT-2's Conv1D
        return trl.SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=byte_tokenizer(),
            peft_config=lora,
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", ["object", "path"])
def test_lora_on_the_projections(trl, family, model, tmp_path, source, way):
    given = model
    if source == "path":
        given = str(tmp_path / "model")
        model.save_pretrained(given)
        byte_tokenizer().save_pretrained(given)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(trl, given, tmp_path, PROJECTIONS[family], **WAYS[way])
    assert math.isfinite(trainer.train().training_loss)
    trained = dict(trainer.model.named_parameters())
    for name, parameter in before.items():
        prefix, _, last = f"base_model.model.{name}".rpartition(".")
        found = trained.get(f"{prefix}.{last}", trained.get(f"{prefix}.base_layer.{last}"))
        assert found is not None
        assert found.equal(parameter), name
    changed = [parameter for name, parameter in trained.items() if "lora_B" in name]
    assert len(changed) == len([name for name in trained if "lora_A" in name]) > 0
    assert all(parameter.any() for parameter in changed)  # they start at 0


def test_padding_and_packing_make_no_difference_to_the_loss(trl, model, tmp_path):
    losses = [
        make_trainer(trl, model, tmp_path, **WAYS[way]).evaluate(Dataset.from_dict({"text": ["a", "bcd" * 9, "ef"]}))
        for way in ("padded", "padding free")
    ]
    first, second = (loss["eval_loss"] for loss in losses)
    assert first == pytest.approx(second, rel=1e-5)


def test_all_weights(trl, model, tmp_path):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(trl, model, tmp_path, **WAYS["padded"])
    assert math.isfinite(trainer.train().training_loss)
    same = [name for name, parameter in trainer.model.named_parameters() if parameter.equal(before[name])]
    assert not same


def test_with_a_fast_weight_layer(trl, family, tmp_path):
    model = add_fast_weight_layer(convert(MAKERS[family]()), FastWeightLayerSettings(segment=16))
    before = model.fast_weight_layer.output_scale.detach().clone()
    trainer = make_trainer(trl, model, tmp_path, **WAYS["packed"])
    assert math.isfinite(trainer.train().training_loss)
    assert not torch.equal(trainer.model.fast_weight_layer.output_scale, before)
