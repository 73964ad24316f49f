"""A Fast Weight Layer in a model: on any base, in pieces, in padded batches, in generate()."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert
from fastweights.models.cache import FastWeightsCache, state_bytes
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from tests import tolerances
from tests.conftest import make_gpt2, random_ids
from tests.models.checks import (
    PADDING,
    check_a_padded_batch_generates_what_each_row_does_alone,
    check_padding_gives_each_row_what_it_has_alone,
    check_pieces_equal_one_pass,
)

KINDS = ["softmax", "pure", "hybrid"]


def trained(base, kind: str = "pure", **settings):
    """A model whose layer is away from its starting point, as training would leave it."""
    if kind != "softmax":
        base = convert(base, ConversionConfig(window=8 if kind == "hybrid" else 0, positions="drop"))
    model = add_fast_weight_layer(base, FastWeightLayerSettings(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model.fast_weight_layer.output_scale.normal_()
        if model.fast_weight_layer.settings.updates:
            model.fast_weight_layer.log_step_size.fill_(-5.5)
    return model


@pytest.fixture(params=KINDS)
def model(base, request):
    return trained(base, request.param)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_model_it_sits_on(base, kind):
    if kind != "softmax":
        base = convert(base, ConversionConfig(window=8 if kind == "hybrid" else 0)).eval()
    model = add_fast_weight_layer(base).eval()
    ids = random_ids(2, 30)
    assert torch.equal(model(ids).logits, base(ids).logits)
    expected = base(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


@torch.no_grad()
def test_learns_from_what_it_reads(model):
    ids = random_ids(1, 20).repeat(1, 2)
    with_updates = model(ids).logits
    model.fast_weight_layer.log_step_size.fill_(-30)
    assert (model(ids).logits - with_updates)[:, 5:].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("cuts", [(7, 8, 9, 25), tuple(range(1, 40))], ids=["pieces", "single tokens"])
def test_pieces_of_any_size_equal_one_pass(model, cuts):
    check_pieces_equal_one_pass(model, cuts)


@pytest.mark.parametrize("where", PADDING)
def test_padding_gives_each_row_what_it_has_alone(model, where):
    check_padding_gives_each_row_what_it_has_alone(model, where)


def test_a_static_cache_beside_softmax_is_refused(base):
    """transformers leaves out the mask that hides its empty places."""
    ids = random_ids(1, 10)
    arguments = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    for model in (
        add_fast_weight_layer(base),
        convert(base, ConversionConfig(layer_types=["full_attention", "linear_attention", "full_attention"])),
    ):
        with pytest.raises(FastWeightsError, match="leave cache_implementation out"):
            model.generate(ids, **arguments)
    pure = convert(base, ConversionConfig())
    assert pure.generate(ids, **arguments).tolist() == pure.generate(ids, max_new_tokens=4, do_sample=False).tolist()


@torch.no_grad()
def test_generates_what_reading_everything_anew_would(model):
    ids = random_ids(2, 10)
    arguments = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 16,
        "eos_token_id": None,
        "pad_token_id": 256,
    }
    for beams in (1, 3):
        kept = model.generate(ids, num_beams=beams, do_sample=False, **arguments)
        anew = model.generate(ids, num_beams=beams, do_sample=False, use_cache=False, **arguments)
        assert kept.tolist() == anew.tolist()


def test_a_padded_batch_generates_what_each_row_does_alone(model):
    check_a_padded_batch_generates_what_each_row_does_alone(model)


@torch.no_grad()
def test_goes_on_from_a_warm_cache(model):
    ids = random_ids(1, 30)
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], cache=cache)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    warm = model.generate(ids, cache=cache, attention_mask=torch.ones_like(ids), **arguments)
    assert warm.tolist() == model.generate(ids, attention_mask=torch.ones_like(ids), **arguments).tolist()


@torch.no_grad()
def test_state_has_a_constant_size():
    model = trained(make_gpt2())
    cache, sizes = FastWeightsCache(model.config), []
    for seed in range(3):
        model(random_ids(1, 50, seed), cache=cache)
        sizes.append(state_bytes(cache))
    assert cache.block is not None
    assert cache.block.get_seq_length() == 150
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("decay", ["none", "scalar", "channel", "input"])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, decay):
    model = trained(make_gpt2(), decay=decay)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = random_ids(1, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_in_bf16_its_own_weights_stay_fp32(tmp_path):
    trained(make_gpt2()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.fast_weight_layer.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model(random_ids(1, 20)).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_cast_to_bf16_it_still_works(kind):
    model = trained(make_gpt2(), kind).to(torch.bfloat16)
    assert {p.dtype for p in model.fast_weight_layer.parameters()} == {torch.float32}
    assert model(random_ids(1, 20)).logits.isfinite().all()


def test_it_is_made_where_the_model_is():
    model = make_gpt2().to("meta")
    assert {p.device.type for p in add_fast_weight_layer(model).parameters()} == {"meta"}
    assert {p.device.type for p in convert(model).parameters()} == {"meta"}


def test_trains_alone_on_a_frozen_model():
    model = trained(make_gpt2(), "softmax")
    model.requires_grad_(False)
    model.fast_weight_layer.requires_grad_(True)
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.fast_weight_layer.parameters())
    assert all(p.grad is None for p in model.model.base.parameters())


def test_embeddings_without_tokens_are_refused():
    model = trained(make_gpt2())
    with pytest.raises(FastWeightsError, match="give input_ids"):
        model(inputs_embeds=torch.randn(1, 5, 32))


def test_a_second_layer_and_an_unknown_setting_are_refused():
    model = trained(make_gpt2())
    with pytest.raises(FastWeightsError, match="already"):
        add_fast_weight_layer(model)
    settings = model.config.to_dict() | {"fast_weight_layer": {"speed": 3}}
    with pytest.raises(FastWeightsError, match="known settings are decay"):
        type(model.config)(**settings)


def test_logits_are_right_at_single_precision():
    """The tolerance of the layer holds for the model as well, where nothing else rounds."""
    model = trained(make_gpt2())
    ids = random_ids(1, 60)
    with torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = torch.cat([model(ids[:, i : i + 20], cache=cache).logits for i in (0, 20, 40)], 1)
    assert (whole - parts).norm() / whole.norm() < 10 * tolerances.FAST_WEIGHT_LAYER
