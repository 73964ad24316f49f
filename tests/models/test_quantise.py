"""Models in few bits: by `load_model(weights=...)` and by transformers, saved, loaded, and where they are refused."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from fastweights.errors import FastWeightsError
from fastweights.layers import quantised
from fastweights.layers.quantised import GROUP, LINEAR, Int4Linear, Int8Linear, QuantisedLinear
from fastweights.models import FastWeightsForCausalLM, add_fast_weight_layer, convert, decoding, load_model
from fastweights.models.quantisation import WeightsConfig, check_not_quantised, quantise, weights_of
from fastweights.ops import few_bits
from fastweights.reading.memory import fingerprint, load_memory, new_memory
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from tests import tolerances
from tests.conftest import MAKERS, make_llama, random_ids
from tests.ops.problems import error

NEAR = {"bf16": 0.05, "int8": 0.08, "int4": 0.6}
"""Relative errors of random models' logits (measured: up to 0.02, 0.04, 0.33)."""


def make(family: str, *, converted: bool) -> PreTrainedModel:
    model = MAKERS[family]()
    return convert(model, ConversionConfig(window=8, positions="drop")).eval() if converted else model


@torch.no_grad()
@pytest.mark.parametrize("weights", LINEAR)
@pytest.mark.parametrize("family", sorted(MAKERS))
@pytest.mark.parametrize("converted", [False, True])
def test_kept_saved_and_loaded(tmp_path, family, weights, converted):
    model, ids = make(family, converted=converted), random_ids(2, 20)
    model.save_pretrained(tmp_path / "whole")
    whole = load_model(tmp_path / "whole")(ids).logits
    kept = load_model(tmp_path / "whole", weights=weights)
    logits = kept(ids).logits
    assert 0 < error(logits, whole) < NEAR[weights]
    assert weights_of(kept) == weights
    layers = {name for name, module in kept.named_modules() if isinstance(module, QuantisedLinear)}
    assert any(name.endswith("lm_head") for name in layers)
    assert not any(type(module) is torch.nn.Linear for module in kept.modules())
    if converted:
        ours = kept.new_tensors()
        for name, tensor in model.new_tensors().items():
            assert ours[name].equal(tensor), name
            assert ours[name].dtype == torch.float32

    kept.save_pretrained(tmp_path / "kept")
    config = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weights"]) == ("fastweights", weights)
    assert ("modules_in_int8" in config) == (converted and weights == "int4")
    asked = WeightsConfig(weights)
    for again in (
        load_model(tmp_path / "kept"),
        load_model(tmp_path / "kept", weights=weights),
        AutoModelForCausalLM.from_pretrained(tmp_path / "kept"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=asked),
    ):
        assert again(ids).logits.equal(logits)
        assert {name for name, module in again.named_modules() if isinstance(module, QuantisedLinear)} == layers
    with pytest.raises(FastWeightsError, match=f"are {weights} already, and .* were asked for"):
        load_model(tmp_path / "kept", weights="int8" if weights != "int8" else "int4")
    # A class's list of tied weights is everybody's.
    assert load_model(tmp_path / "whole")(ids).logits.equal(whole)


def names_of(kind: type, model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


def first_and_last_converted(family: str) -> PreTrainedModel:
    return convert(MAKERS[family](), ConversionConfig(window=8, positions="drop", layers="0,2", wide_window=0)).eval()


@pytest.mark.parametrize(
    ("family", "attention", "matrices"), [("gpt2", "h.{}.attn", 2), ("llama", "layers.{}.self_attn", 4)]
)
def test_converted_attention_has_eight_bits(family, attention, matrices):
    """And that of layers that were left as they are has four, as everything else but the unembedding."""
    model = quantise(first_and_last_converted(family), "int4")
    eight, four = names_of(Int8Linear, model), names_of(Int4Linear, model)
    places = [f"model.base.{attention.format(i)}." for i in range(3)]
    for place, (in_eight, in_four) in zip(places, [(matrices, 0), (0, matrices), (matrices, 0)], strict=True):
        assert len([name for name in eight if name.startswith(place)]) == in_eight
        assert len([name for name in four if name.startswith(place)]) == in_four
    assert {name for name in eight if not name.startswith(tuple(places))} == {"lm_head"}
    assert names_of(Int8Linear, quantise(MAKERS[family](), "int4")) == {"lm_head"}


@torch.no_grad()
def test_training_smaller_than_a_step_of_four_bits_is_kept(tmp_path):
    """The base model's matrices may lie on a grid of four bits, to which rounding to four would lead back."""
    model, step = make("llama", converted=True), 0.125
    weight = model.fast_attentions()[0].q_proj.weight
    torch.manual_seed(0)
    codes = torch.randint(16, (len(weight), GROUP))
    codes[:, 0], codes[:, 1] = 0, 15  # each group uses all of it
    before, learned = step * (codes - 8), 0.03 * step * torch.randn(codes.shape)
    weight.copy_(before + learned)
    model.save_pretrained(tmp_path)

    def share_kept(config: WeightsConfig) -> float:
        kept = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        difference = kept.fast_attentions()[0].q_proj.matrix().float() - before
        return float((difference * learned).sum() / learned.square().sum())

    assert share_kept(WeightsConfig("int4")) > 0.8
    assert share_kept(WeightsConfig("int4", modules_in_int8=[])) < 0.3


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(MAKERS))
def test_the_mix_of_bits_is_loaded_without_a_head_and_as_saved_before(tmp_path, family):
    ids, asked = random_ids(1, 20), WeightsConfig("int4")
    make(family, converted=True).save_pretrained(tmp_path / "whole")
    mixed = FastWeightsForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=asked)
    assert asked.modules_in_int8 is None  # and may be asked of another model
    mixed.save_pretrained(tmp_path / "mixed")
    headless = AutoModel.from_pretrained(tmp_path / "mixed")
    assert headless(ids).last_hidden_state.equal(mixed.model(ids).last_hidden_state)
    headless = AutoModel.from_pretrained(tmp_path / "whole", quantization_config=asked)
    assert headless(ids).last_hidden_state.equal(mixed.model(ids).last_hidden_state)

    four = WeightsConfig("int4", modules_in_int8=[])
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=four)
    assert names_of(Int8Linear, old) == {"lm_head"}
    old.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["quantization_config"]["modules_in_int8"]  # there was none
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    again = load_model(tmp_path / "old")
    assert again(ids).logits.equal(old(ids).logits)
    again.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved == config["quantization_config"]
    assert fingerprint(load_model(tmp_path / "again")) == fingerprint(again)


def test_a_file_is_smaller(tmp_path):
    sizes = {}
    for weights in ("fp32", "int8", "int4"):
        model = MAKERS["llama"](hidden_size=128, intermediate_size=256)
        quantise(model, weights).save_pretrained(tmp_path / weights)
        sizes[weights] = (tmp_path / weights / "model.safetensors").stat().st_size
    assert sizes["int4"] < sizes["int8"] < 0.5 * sizes["fp32"]


@torch.no_grad()
@pytest.mark.parametrize("weights", LINEAR)
def test_generation_and_memory(tmp_path, weights):
    model = quantise(make("llama", converted=True), weights)
    ids = random_ids(2, 12)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **arguments).shape == (2, 20)
    memory = new_memory(model).read([ids[0]])
    memory.save(tmp_path / "x.memory")
    again = load_memory(model, tmp_path / "x.memory")
    assert again.tokens == 12
    with pytest.raises(FastWeightsError, match="made by another model"):
        load_memory(make("llama", converted=True), tmp_path / "x.memory")


def test_layers_that_are_left_out():
    model = MAKERS["llama"]()
    quantise(model, "int8")
    assert isinstance(model.lm_head, Int8Linear)
    folder_config = WeightsConfig("int4", modules_to_not_convert=["lm_head", "down_proj"])
    assert folder_config.to_dict()["modules_to_not_convert"] == ["lm_head", "down_proj"]


def test_modules_that_are_not_to_be_converted(tmp_path):
    MAKERS["llama"]().save_pretrained(tmp_path)
    config = WeightsConfig("int8", modules_to_not_convert=["lm_head", "down_proj", "model.layers.0"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    first = {name for name in plain if name.startswith("model.layers.0.")}
    assert len(first) == 7
    assert plain - first == {"lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"}


@torch.no_grad()
def learning(vocab_size: int = 272) -> FastWeightsForCausalLM:
    """With a Fast Weight Layer that has something to say."""
    torch.manual_seed(0)
    base = MAKERS["llama"]()
    base.resize_token_embeddings(vocab_size, mean_resizing=False)
    base = convert(base, ConversionConfig(window=8))
    model = add_fast_weight_layer(base, FastWeightLayerSettings(segment=6)).eval()
    model.fast_weight_layer.output_scale.normal_(std=0.3)
    model.fast_weight_layer.log_step_size += 1.0
    return model


needs_kernels = pytest.mark.skipif(not few_bits.lanes(), reason="this machine has no kernel of eight bits")


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_fast_weight_layer_learns_from_an_unembedding_of_eight_bits(tmp_path, weights, rows):
    """Token by token as in one pass, where many positions take it unpacked; with steps of ours and without."""
    model, ids = quantise(learning(), weights), random_ids(rows, 30)
    assert type(model.lm_head) is Int8Linear
    assert "lm_head" in model.config.quantization_config.modules_in_int8
    logits = model(ids, use_cache=False).logits
    still = deepcopy(model)
    still.fast_weight_layer.log_step_size -= 30.0
    learned = error(still(ids, use_cache=False).logits, logits)
    assert learned > 0.01
    for fast in (True, False):
        decoding.set_fast_decoding(fast)
        try:
            cache = model(ids[:, :12]).cache
            parts = [model(ids[:, t : t + 1], cache=cache).logits for t in range(12, 30)]
        finally:
            decoding.set_fast_decoding(True)
        assert error(torch.cat(parts, 1), logits[:, 12:]) < 0.05 * learned  # as rows are rounded otherwise

    model.save_pretrained(tmp_path / "kept")
    again = load_model(tmp_path / "kept")
    assert type(again.lm_head) is Int8Linear
    assert again(ids).logits.equal(logits)


@torch.no_grad()
def test_an_unembedding_of_eight_bits_without_its_kernel(tmp_path, monkeypatch):
    """As on another machine, which unpacks what was saved on one that has it, once."""
    model, ids = learning(), random_ids(1, 20)
    config = WeightsConfig("int8", modules_in_int8=["lm_head"])
    model.save_pretrained(tmp_path / "whole")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config)
    kept.save_pretrained(tmp_path / "kept")
    logits, saved = kept(ids).logits, kept.lm_head.state_dict()
    monkeypatch.setattr(few_bits, "lanes", lambda: 0)
    other = load_model(tmp_path / "kept")
    assert type(other.lm_head) is Int8Linear
    unpacked, plain = [], Int8Linear._plain
    monkeypatch.setattr(Int8Linear, "_plain", lambda self: unpacked.append(self) or plain(self))
    cache = other(ids[:, :18]).cache
    parts = [other(ids[:, t : t + 1], cache=cache).logits for t in (18, 19)]
    assert error(torch.cat(parts, 1), logits[:, 18:]) < NEAR["int8"]
    of_head = [layer for layer in unpacked if layer is other.lm_head]
    assert len(of_head) == 2  # for its logits of many, and for the layer
    assert not hasattr(pickle.loads(pickle.dumps(other.lm_head)), "_whole")
    saved["scales"] = 2 * saved["scales"]
    other.lm_head.load_state_dict(saved)
    other(ids[:, :18])
    assert len([layer for layer in unpacked if layer is other.lm_head]) == 4
    doubled = other.lm_head.whole().weight
    assert doubled.equal(2 * kept.lm_head.whole().weight)


def test_gradients_after_an_unembedding_was_unpacked_in_inference_mode(monkeypatch):
    monkeypatch.setattr(few_bits, "lanes", lambda: 0)
    model, ids = quantise(learning(), "int8"), random_ids(1, 20)
    with torch.inference_mode():
        model(ids)
    model(ids).logits.sum().backward()
    assert model.fast_weight_layer.output_scale.grad.isfinite().all()


@needs_kernels
@torch.no_grad()
def test_what_watches_an_unembedding_sees_the_logits_alone():
    model, ids, seen = quantise(learning(), "int8"), random_ids(1, 20), []
    model.lm_head.register_forward_hook(lambda module, given, said: seen.append(said))
    cache = model(ids[:, :18]).cache
    logits = [model(ids[:, t : t + 1], cache=cache).logits for t in (18, 19)]
    assert len(seen) == 3
    assert all(a.equal(b) for a, b in zip(seen[1:], logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("rows", [9, 17])
def test_many_rows_learn_from_an_unembedding_of_eight_bits(rows, monkeypatch):
    """Of each of which one token has a label: with 17, more than the kernels for few take."""
    monkeypatch.setattr(quantised, "has_bf16_products", lambda: False)  # by which many tokens at once are rounded
    model, ids = quantise(learning(), "int8"), random_ids(rows, 16)
    logits = model(ids, use_cache=False).logits
    cache = model(ids[:, :12]).cache
    parts = [model(ids[:, t : t + 1], cache=cache).logits for t in range(12, 16)]
    assert error(torch.cat(parts, 1), logits[:, 12:]) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_an_unembedding_that_a_fast_weight_layer_learns_from_may_stay_whole(tmp_path, weights):
    """In bf16 always; where it is said; and as it was saved before. Of an odd size it is kept unpacked beside."""
    vocab_size = 272 if weights == "bf16" else 257
    model, ids = quantise(learning(vocab_size), weights), random_ids(1, 20)
    assert type(model.lm_head) is (torch.nn.Linear if weights == "bf16" else Int8Linear)
    assert error(model(ids).logits, learning(vocab_size)(ids).logits) < NEAR[weights]
    learning().save_pretrained(tmp_path / "whole")
    for config in (WeightsConfig("int4", ["lm_head"]), WeightsConfig("int4", modules_in_int8=["self_attn"])):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config)
        assert type(model.lm_head) is torch.nn.Linear
        model.save_pretrained(tmp_path / "kept")
        again = load_model(tmp_path / "kept")
        assert type(again.lm_head) is torch.nn.Linear
        assert again(ids).logits.equal(model(ids).logits)


def test_what_is_refused(tmp_path):
    with pytest.raises(FastWeightsError, match="weights 'int3' is unknown; known are fp32, bf16, int8, int4"):
        load_model("embedded", weights="int3")
    with pytest.raises(FastWeightsError, match="weights 'fp32' is unknown"):
        WeightsConfig("fp32")
    make("llama", converted=True).save_pretrained(tmp_path)
    with pytest.raises(FastWeightsError, match="modules_in_int8 has 'nosuch', and the model no linear layer"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=WeightsConfig("int4", modules_in_int8=["nosuch"])
        )
    model = quantise(MAKERS["llama"](), "int4")
    with pytest.raises(FastWeightsError, match="weights are int4, and conversion needs them whole"):
        convert(model)
    check_not_quantised(MAKERS["llama"](), "training")


@torch.no_grad()
def test_a_gguf_file(tmp_path, shared_data):
    """Whose weights transformers makes whole, and whose config still says otherwise."""
    pytest.importorskip("gguf")
    try:
        whole = load_model("smollm2-base")
    except FastWeightsError:
        pytest.skip("SmolLM2 is not installed")
    kept, ids = load_model("smollm2-base", weights="int4"), random_ids(1, 20)
    assert weights_of(whole) == "fp32"
    assert 0 < error(kept(ids).logits, whole(ids).logits) < 0.1
    kept.save_pretrained(tmp_path)
    assert load_model(tmp_path)(ids).logits.equal(kept(ids).logits)


@torch.no_grad()
def test_a_damaged_scale_is_noticed(tmp_path):
    model = quantise(MAKERS["llama"](), "int8")
    model.model.layers[0].mlp.up_proj.scales[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(FastWeightsError, match=r"up_proj\.scales .* is not finite"):
        load_model(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("weights", LINEAR)
def test_offloaded_numbers_are_those_that_are_saved(weights):
    """accelerate keeps what `state_dict` gives, and puts it where packed numbers were."""
    model, ids = quantise(make_llama(hidden_size=64, intermediate_size=128), weights), random_ids(1, 5)
    before = model(ids).logits
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    for rows in (1, 5):
        assert error(model(ids[:, :rows]).logits, before[:, :rows]) <= 8 * tolerances.BFLOAT16
