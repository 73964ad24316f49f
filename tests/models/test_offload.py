"""Models whose weights lie on disk, or in another memory, and come in when a module is called (accelerate)."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModel, AutoModelForCausalLM

from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert, load_model
from fastweights.models.quantisation import WeightsConfig, quantise
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import MAKERS, make_gpt2, random_ids
from tests.models.test_fast_weight_layer import trained

KINDS = {
    "pure": ConversionConfig(),
    "hybrid": ConversionConfig(window=8),
    "mixed": ConversionConfig(window=8, layer_types=["linear_attention", "full_attention", "hybrid_sliding"]),
}
CPU = torch.device("cpu")


def make(family: str, kind: str):
    if kind in KINDS:
        return convert(MAKERS[family](), KINDS[kind]).eval()
    return trained(MAKERS[family](tie_word_embeddings=kind == "tied block"))


def load(folder, way: str, offload_folder):
    if way == "device_map cpu":
        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    if way == "device_map disk":
        return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=offload_folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    if way == "cpu_offload":
        cpu_offload(loaded, CPU)
    else:
        disk_offload(loaded, str(offload_folder), CPU)
    return loaded


@pytest.mark.parametrize("way", ["device_map disk", "cpu_offload", "some on disk"])
def test_a_model_that_is_spread_out_is_not_converted(tmp_path, way):
    """What is put into it would lie where accelerate does not look for it."""
    make_gpt2().save_pretrained(tmp_path / "model")
    if way == "some on disk":
        places = {
            "transformer.wte": "cpu",
            "transformer.wpe": "cpu",
            "transformer.h": "disk",
            "transformer.ln_f": "cpu",
        }
        places |= {"transformer.drop": "cpu", "lm_head": "cpu"}
        given = {"device_map": places, "offload_folder": tmp_path / "offload"}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **given)
    else:
        model = load(tmp_path / "model", way, tmp_path / "offload")
    for change in (convert, add_fast_weight_layer):
        with pytest.raises(FastWeightsError, match=r"^the model lies on .*: load it without device_map"):
            change(model)
    whole = load(tmp_path / "model", "device_map cpu", tmp_path / "offload")
    for change in (convert, add_fast_weight_layer):
        change(whole)(random_ids(1, 5))


@torch.no_grad()
@pytest.mark.parametrize("way", ["device_map cpu", "device_map disk", "cpu_offload", "disk_offload"])
@pytest.mark.parametrize("kind", [*KINDS, "tied block", "untied block"])
@pytest.mark.parametrize("family", sorted(MAKERS))
def test_offloaded_it_says_the_same(family, kind, tmp_path, way):
    model = make(family, kind)
    ids = random_ids(2, 20)
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model", way, tmp_path / "offload")
    if way != "device_map cpu":
        assert all(parameter.is_meta for parameter in loaded.parameters())
    assert loaded(ids).logits.equal(model(ids).logits)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert loaded.generate(ids, attention_mask=torch.ones_like(ids), **arguments).equal(expected)


@torch.no_grad()
def test_few_bits(tmp_path):
    """Saved so they are offloaded; what is not in memory is not rounded."""
    model = make("llama", "hybrid")
    model.save_pretrained(tmp_path / "model")
    places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(FastWeightsError, match="are not in memory"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=WeightsConfig("int8"), **places)
    quantise(model, "int8").save_pretrained(tmp_path / "small")
    ids = random_ids(2, 20)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", **places),
        load_model(tmp_path / "small", **places),
    ):
        assert loaded(ids).logits.equal(model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_our_own_loading_takes_places(place, tmp_path):
    model, ids = make("llama", "mixed"), random_ids(2, 20)
    model.save_pretrained(tmp_path / "model")
    places = {"device_map": {"": place}, "offload_folder": tmp_path / "offload"}
    loaded = load_model(tmp_path / "model", **places)
    assert all(parameter.is_meta == (place == "disk") for parameter in loaded.parameters())
    assert loaded(ids).logits.equal(model(ids).logits)
    with pytest.raises(FastWeightsError, match="smollm2 is an adapter"):
        load_model("smollm2", **places)


@torch.no_grad()
@pytest.mark.parametrize("away", ["model.base", "model.fast_weight_layer", "lm_head"])
def test_a_part_alone_is_offloaded(tmp_path, away):
    model = make("llama", "untied block")
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.base", "model.fast_weight_layer", "lm_head"), "cpu") | {away: "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert {name for name, p in loaded.named_parameters() if p.is_meta} == {
        name for name, _ in loaded.named_parameters() if name.startswith(away)
    }
    ids = random_ids(2, 20)
    assert loaded(ids).logits.equal(model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("decay", ["none", "scalar", "channel", "input"])
def test_a_fast_weight_layer_with_any_decay(tmp_path, decay):
    model = trained(make_gpt2(), decay=decay, segment=5)
    ids = random_ids(2, 20)
    expected = model(ids).logits
    disk_offload(model, str(tmp_path), CPU)
    assert model(ids).logits.equal(expected)


@torch.no_grad()
def test_a_headless_model_with_tied_embeddings(tmp_path):
    model = trained(make_gpt2())
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    ids = random_ids(2, 20)
    assert loaded(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)
