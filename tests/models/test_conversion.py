import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
)

from fastweights.errors import FastWeightsError
from fastweights.models import FastWeightsForCausalLM, add_fast_weight_layer, convert, load_model
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.teacher import load_teacher
from tests.conftest import VOCABULARY, make_gpt2, make_llama, random_ids


@torch.no_grad()
def test_a_model_whose_layers_all_stay_has_the_logits_it_had(base):
    ids = random_ids(2, 30)
    before = base(ids).logits
    converted = convert(base, ConversionConfig(layer_types=["full_attention"] * 3))
    torch.testing.assert_close(converted(ids).logits, before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_model_given_is_not_touched(base):
    ids = random_ids(1, 20)
    before, weights = base(ids).logits, {name: p.clone() for name, p in base.named_parameters()}
    converted = convert(base, ConversionConfig(positions="drop"))
    for parameter in converted.parameters():
        parameter.add_(1.0)
    assert torch.equal(base(ids).logits, before)
    assert all(torch.equal(p, weights[name]) for name, p in base.named_parameters())


def test_every_pretrained_weight_is_kept(base):
    converted = dict(convert(base).named_parameters())
    for name, parameter in base.named_parameters():
        headless = name.removeprefix(f"{base.base_model_prefix}.")
        assert torch.equal(converted.pop(name if name == headless else f"model.base.{headless}"), parameter)
    new = convert(base).new_parameter_names()
    assert sorted(converted) == sorted(new)
    assert len(new) == 3 * 5  # two gates with a bias each, and one scale, in three layers


def test_gates_start_with_a_spread_of_time_constants(base):
    layer = convert(base, ConversionConfig(gate_bias=(1.0, 4.0))).fast_attentions()[0]
    key, value = layer.rule.log_gates(torch.randn(1, 5, 32))
    expected = torch.sigmoid(torch.linspace(1.0, 4.0, layer.head_dim))
    torch.testing.assert_close(key.exp(), expected.expand_as(key))
    torch.testing.assert_close(value.exp(), expected.expand_as(value))


def test_a_window_as_long_as_the_text_and_nothing_else_is_softmax_attention(base):
    ids = random_ids(1, 30)
    model = convert(base, ConversionConfig(window=30))
    with torch.no_grad():
        for layer in model.fast_attentions():
            layer.fast_scale.zero_()
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)


def test_from_and_to_a_folder(model_folder, tmp_path):
    model = convert(model_folder, ConversionConfig(window=8))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, FastWeightsForCausalLM)
    assert loaded.config.base_model == str(model_folder)
    assert loaded.config.layer_types == ["hybrid_sliding"] * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rule": "forget"}, "rule 'forget' is unknown; known are decay"),
        ({"feature_map": "elu"}, "feature_map 'elu' is unknown; known are identity"),
        ({"window": 1}, "2 or more"),
        ({"write": "late", "window": 8}, "write 'late' is unknown; known are all, leaving"),
        ({"write": "leaving"}, "write is leaving and window is 0"),
        ({"gate_rank": -1}, "gate_rank is -1; allowed are 0"),
        ({"rule": "add", "gate_rank": 2}, "rule add has no gates: leave gate_rank out"),
        ({"write_bias": (-3.0,)}, r"write_bias is \(-3.0,\); it must be two finite numbers"),
        ({"write_bias": (-3.0, -3.0)}, "rule decay has no such gates: leave write_bias out"),
        ({"rule": "delta", "gate_bias": (4.0, 8.0)}, "rule delta has no such gates: leave gate_bias out"),
        ({"rule": "gated", "value_gate": False}, "rule gated has no such gates: leave value_gate out"),
        ({"normaliser": True}, "rule decay has no normaliser: leave it out, or take rule add or gated"),
        ({"normaliser": True, "rule": "average", "feature_map": "elu"}, "feature_map 'elu' is unknown"),
        ({"normaliser": True, "rule": "gated"}, r"with feature_map identity weights may sum to 0.* elu\+1, relu"),
        (
            {"feature_dim": 8},
            "nor feature_map identity learns features: .* relu or softmax, or rule delta_and_average",
        ),
        (
            {"feature_dim": 8, "feature_map": "linear", "rule": "gated_delta"},
            "nor feature_map linear learns features",
        ),
        ({"feature_dim": 0, "feature_map": "relu"}, "feature_dim is 0; allowed are 1 and more"),
        ({"feature_dim": 2.5, "feature_map": "relu"}, "feature_dim is 2.5"),
        ({"window": -3}, "2 or more"),
        ({"layer_types": ["linear_attention"]}, "has 3 layers"),
        ({"layer_types": ["softmax"] * 3}, "known are linear_attention, hybrid_sliding, full_attention"),
        ({"layer_types": ["hybrid_sliding"] * 3}, "give a window"),
    ],
)
def test_bad_settings(arguments, expected):
    with pytest.raises(FastWeightsError, match=expected):
        convert(make_gpt2(), ConversionConfig(**arguments))


def test_add_and_gated_have_a_normaliser_where_their_map_allows_it():
    for rule in ("add", "gated", "average", "decay"):
        for feature_map in ("identity", "elu+1"):
            config = convert(make_gpt2(), ConversionConfig(rule=rule, feature_map=feature_map)).config
            allowed = rule in ("add", "gated") and feature_map == "elu+1"
            assert config.settings.normaliser == allowed
    without = convert(make_gpt2(), ConversionConfig(rule="add", feature_map="elu+1", normaliser=False))
    assert without.fast_attentions()[0].rule.state_shape == (2, 16, 16)


@torch.no_grad()
def test_a_model_that_was_saved_before_there_were_normalisers_has_none(tmp_path):
    model = convert(make_gpt2(), ConversionConfig(rule="add", feature_map="elu+1", normaliser=False)).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["conversion"]["normaliser"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = random_ids(1, 20)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.settings.normaliser is False
    assert loaded(ids).logits.equal(model(ids).logits)


def test_unknown_family_names_the_known_ones(tmp_path):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(FastWeightsError, match="'bert' cannot be converted; known types are gemma3_text, gpt2"):
        convert(tmp_path)


def test_a_converted_model_is_not_converted_again(tmp_path):
    convert(make_llama()).save_pretrained(tmp_path)
    with pytest.raises(FastWeightsError, match="has fast weights already"):
        convert(tmp_path)


@pytest.mark.parametrize("change", [convert, add_fast_weight_layer])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_models_without_a_head_are_told_so(tmp_path, change, auto):
    base = make_llama(tie_word_embeddings=False)
    for make in (make_gpt2, make_llama):
        headless = auto.from_config(make().config)
        with pytest.raises(FastWeightsError, match=f"{type(headless).__name__} has no unembedding"):
            change(headless)
    auto.from_config(base.config).save_pretrained(tmp_path)
    with pytest.raises(FastWeightsError, match=r"has no unembedding|names do not match, such as lm_head.weight"):
        change(tmp_path)


@torch.no_grad()
def test_a_folder_without_a_head_whose_embeddings_are_tied_has_all_it_needs(tmp_path):
    base, ids = make_llama(tie_word_embeddings=True), random_ids(1, 20)
    base.model.save_pretrained(tmp_path)
    model = convert(tmp_path, ConversionConfig(layer_types=["full_attention"] * 3))
    assert torch.equal(model(ids).logits, base(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("change", [convert, add_fast_weight_layer])
def test_models_of_peft_are_to_be_merged(change):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"])
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped, prompted = (peft.get_peft_model(make_llama(), config) for config in (lora, prompt))
    for model in (wrapped, wrapped.get_base_model(), prompted):
        with pytest.raises(FastWeightsError, match=r"merge its adapter with peft's merge_and_unload\(\)") as caught:
            change(model)
        assert "\n" not in str(caught.value)
    change(wrapped.merge_and_unload())


def test_what_is_converted_or_no_model_gets_one_line():
    model = convert(make_llama())
    for given, expected in (
        (model, "FastWeightsForCausalLM has fast weights already"),
        (model.model, "FastWeightsModel has no unembedding"),
        (torch.nn.Linear(2, 2), "a Linear was given"),
        (None, "a NoneType was given"),
    ):
        with pytest.raises(FastWeightsError, match=expected) as caught:
            convert(given)
        assert "\n" not in str(caught.value)


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _foreign(folder):
    make_llama().save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "model.safetensors")


def _pickle(folder):
    torch.save(make_gpt2().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _foreign, _pickle, _no_config])
def test_damaged_checkpoints_get_one_line(tmp_path, damage):
    make_gpt2().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(FastWeightsError, match=r"cannot load a model|not those of its config|no config.json") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folder():
    with pytest.raises(FastWeightsError, match="does not exist"):
        load_model("./nowhere")


def _counted(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


@torch.no_grad()
def test_gguf_checkpoint(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    original = make_llama(hidden_size=32, num_key_value_heads=4, tie_word_embeddings=False)
    write_gguf(gguf, original, tmp_path / "model.gguf")
    own, parsed = (gguf.GGUFReader, gguf.get_tensor_name_map), []
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", _counted(gguf.GGUFReader._build_fields, parsed))
    loaded = load_model(tmp_path / "model.gguf")
    assert len(parsed) == 1
    assert not isinstance(parsed[0][0].data, np.memmap)  # each slice of which is another, and takes three times as long
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
    ids = random_ids(1, 20)
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    converted = convert(tmp_path / "model.gguf")
    assert converted(ids).logits.isfinite().all()
    assert converted.config.base_model == str(tmp_path / "model.gguf")
    load_teacher(converted)


def write_gguf(gguf, model, path) -> None:
    """A Llama as llama.cpp would write it: other names, and q and k in its interleaved rotary order."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers.": "blk.",
    }
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
