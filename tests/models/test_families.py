"""What every family must pass, whatever its row in ARCHITECTURES says; and what a row cannot express."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert
from fastweights.models import architectures as module
from fastweights.models.architectures import ARCHITECTURES, SplitProjections, local_windows
from fastweights.models.recording import record_calls
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.teacher import record_attention
from tests import tolerances
from tests.conftest import (
    FAMILIES,
    MAKERS,
    make_gemma3,
    make_gpt_neox,
    make_mistral,
    make_opt,
    make_qwen2,
    make_qwen3,
    make_smollm3,
    random_ids,
)
from tests.models.checks import (
    check_a_padded_batch_generates_what_each_row_does_alone,
    check_padding_gives_each_row_what_it_has_alone,
    check_pieces_equal_one_pass,
)
from tests.ops.problems import error

HYBRID = ConversionConfig(window=8, rotary=False)


def test_all_families_are_tested():
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_converted_layer_it_is_the_model_it_was_bit_for_bit(family, dtype):
    family, ids, labels = family.to(dtype), random_ids(2, 30), random_ids(2, 30, seed=1)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    converted = convert(family, ConversionConfig(layer_types=["full_attention"] * 3))
    assert torch.equal(converted(ids).logits, family(ids).logits)
    assert torch.equal(converted(ids, labels=labels).loss, family(ids, labels=labels).loss)
    assert torch.equal(converted.model(ids)[0], family.base_model(ids)[0])
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    after, before = (model(ids, **given).logits[mask.bool()] for model in (converted, family))
    assert torch.equal(after, before)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_window_as_long_as_the_text_and_nothing_else_is_softmax_attention(name, tied):
    base, ids = FAMILIES[name](tie_word_embeddings=tied), random_ids(1, 30)
    model = softmax_alone(base)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@torch.no_grad()
def test_in_bfloat16_such_a_window_is_as_near_as_the_model_itself(family):
    ids = random_ids(1, 30)
    truth = family(ids).logits
    base = family.to(torch.bfloat16)
    found = softmax_alone(base)(ids).logits
    assert found.dtype == torch.bfloat16
    assert error(found, truth) <= 1.5 * error(base(ids).logits, truth)


def softmax_alone(base, window=30):
    """Converted, with a window that sees all of a text and no fast weights."""
    model = convert(base, ConversionConfig(window=window)).eval()
    for layer in model.fast_attentions():
        layer.fast_scale.zero_()
    return model


@torch.no_grad()
def test_a_student_given_what_its_teachers_attention_was_given(family):
    """Of one document and of two in a row."""
    ids, model = random_ids(2, 30), softmax_alone(family)
    for positions in (None, torch.cat((torch.arange(12), torch.arange(18))).expand(2, -1)):
        records = record_attention(family, ids, positions)
        assert model.reproduction_errors(records, positions).max() <= tolerances.FLOAT32
    embeddings, layer = model.model.window_embeddings(ids, positions), model.fast_attentions()[0]
    if embeddings is not None:  # none of these has left the window yet
        torch.testing.assert_close(embeddings[layer.window].sinks, records[layer.layer_idx].position_embeddings)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 8])
def test_generation_equals_one_pass(family, window):
    model = convert(family, ConversionConfig(window=window)).eval()
    ids = random_ids(2, 12)
    arguments = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 256}
    output = model.generate(
        ids, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True, **arguments
    )
    one_pass = model(output.sequences, use_cache=False).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), one_pass, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MAKERS.keys()), indirect=True)
def test_pieces_padding_and_batches(family):
    model = convert(family, HYBRID).eval()
    check_pieces_equal_one_pass(model, (7, 8, 9, 25))
    # The base model's own windows count padding in holes.
    for where in () if any(local_windows(model.config.base)) else ("left", "holes"):
        check_padding_gives_each_row_what_it_has_alone(model, where)
    check_a_padded_batch_generates_what_each_row_does_alone(model)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MAKERS.keys()), indirect=True)
def test_saved_and_loaded(family, tmp_path):
    model = convert(family, HYBRID).eval()
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = random_ids(1, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "a")(ids)[0], model.model(ids)[0])
    loaded.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@torch.no_grad()
def test_gpt_neox_with_and_without_parallel_residual():
    for parallel in (True, False):
        base, ids = make_gpt_neox(use_parallel_residual=parallel), random_ids(1, 30)
        model = softmax_alone(base)
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_row_that_leaves_parts_out_is_refused(monkeypatch):
    """A Llama row copied for Qwen3 would skip its q and k norms without a word."""
    row = replace(ARCHITECTURES["qwen3"], projections=SplitProjections())
    monkeypatch.setitem(module.ARCHITECTURES, "qwen3", row)
    with pytest.raises(FastWeightsError, match="Qwen3Attention has k_norm, q_norm, which SplitProjections"):
        convert(make_qwen3())


def test_a_row_with_parts_that_are_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(module.ARCHITECTURES, "qwen3", replace(ARCHITECTURES["gpt_neox"], attention="self_attn"))
    with pytest.raises(FastWeightsError, match=r"Qwen3Attention has .* which InterleavedProjections would leave out"):
        convert(make_qwen3())


def test_an_attention_that_computes_something_else_is_refused(monkeypatch):
    """As a row that forgets that GPT-NeoX has rotary embedding, or a model that caps its scores, would."""
    no_rotary = type(
        "NoRotary", (type(ARCHITECTURES["gpt_neox"].projections),), {"rotate": lambda self, q, k, _: (q, k)}
    )
    row = replace(ARCHITECTURES["gpt_neox"], projections=no_rotary("query_key_value", "dense"))
    monkeypatch.setitem(module.ARCHITECTURES, "gpt_neox", row)
    with pytest.raises(FastWeightsError, match=r"attention of layer 0 \(GPTNeoXAttention\) is not what its row"):
        convert(make_gpt_neox())


def test_logits_that_are_more_than_the_unembedding_are_refused(family, monkeypatch):
    forward = type(family).forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    monkeypatch.setattr(type(family), "forward", capped)
    with pytest.raises(FastWeightsError, match="more than its unembedding"):
        convert(family)


def test_layers_with_windows_of_their_own_stay_softmax():
    types = ["full_attention", "sliding_attention", "full_attention"]
    base = make_qwen3(layer_types=types, use_sliding_window=True, sliding_window=4)
    with pytest.raises(
        FastWeightsError, match=r"layer 1 has sliding-window attention over 4 tokens.* leave it as full"
    ):
        convert(base, ConversionConfig(layer_types=["linear_attention"] * 3))
    model = convert(base)
    assert model.config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    check_pieces_equal_one_pass(model.eval(), (7, 8, 25))


@torch.no_grad()
def test_a_model_of_windows_alone_is_refused_and_may_have_a_block_before_its_head():
    base = make_mistral(sliding_window=4)
    with pytest.raises(FastWeightsError, match=r"over 4 tokens, .* set sliding_window in its config to None"):
        convert(base)
    base.config.sliding_window = None
    convert(base)
    base.config.sliding_window = 4
    model = add_fast_weight_layer(base).eval()
    assert torch.equal(model(random_ids(1, 30)).logits, base(random_ids(1, 30)).logits)
    check_pieces_equal_one_pass(model, (7, 8, 25))
    check_a_padded_batch_generates_what_each_row_does_alone(model)
    cache = model(random_ids(1, 30), use_cache=True).cache
    assert [layer.keys.shape[-2] for layer in cache.layers[:3]] == [3, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_caps_of_scores_and_logits_are_refused_however_high(name):
    base = make_gemma3(**{name: 1e6})
    with pytest.raises(FastWeightsError, match=f"{name} is 1000000.0"):
        convert(base)


def test_attention_that_sees_what_comes_is_refused():
    with pytest.raises(FastWeightsError, match="is not what its row"):
        convert(make_gemma3(use_bidirectional_attention=True))


def test_sinks_of_a_models_own_are_refused():
    """As GPT-OSS has them, a parameter of its attention."""
    base = make_qwen2()
    base.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(FastWeightsError, match="Qwen2Attention has sinks, which SplitProjections would leave out"):
        convert(base)


@torch.no_grad()
def test_layers_without_rotary_embedding_use_none():
    base, x = make_smollm3(), torch.randn(1, 30, 32)
    near, far = (base.model.rotary_emb(x, torch.arange(30)[None] * step) for step in (1, 3))
    same = [
        torch.equal(layer(x, position_embeddings=near)[0], layer(x, position_embeddings=far)[0])
        for layer in convert(base).eval().fast_attentions()
    ]
    assert same == [False, True, False]


@torch.no_grad()
def test_opt_with_narrow_embeddings_and_norms_after_its_layers():
    """As opt-350m is."""
    base, ids = make_opt(word_embed_proj_dim=16, do_layer_norm_before=False), random_ids(1, 30)
    torch.testing.assert_close(softmax_alone(base)(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(FastWeightsError, match="layer 0 has no normalisation before its attention"):
        convert(base, ConversionConfig(positions="drop"))
    with pytest.raises(FastWeightsError, match="takes 16 channels and the model has 32"):
        add_fast_weight_layer(base)


@torch.no_grad()
def test_opt_without_its_positions_reads_on():
    base, ids = make_opt(), random_ids(1, 200)
    model = convert(base, ConversionConfig(positions="drop")).eval()
    with pytest.raises(FastWeightsError, match="absolute positions end at 128"):
        convert(base)(ids)
    assert model(ids).logits.isfinite().all()
    given = {"position_ids": torch.arange(5, 35)[None]}
    assert torch.equal(model(ids[:, :30], **given).logits, model(ids[:, :30]).logits)
    records = record_attention(base, ids[:, :30], positions="drop")
    with record_calls(model.model.base, ARCHITECTURES["opt"]) as calls:
        model(ids[:, :30])
    torch.testing.assert_close(records[0].inputs, calls[0].inputs)


@torch.no_grad()
def test_a_cache_under_another_name_is_refused(monkeypatch):
    """Its state would be lost without a word."""
    monkeypatch.setitem(module.ARCHITECTURES, "gpt_neox", replace(ARCHITECTURES["gpt_neox"], cache_argument="cache"))
    model = convert(make_gpt_neox())
    with pytest.raises(FastWeightsError, match="was given a cache as layer_past and looks for it in cache"):
        model(random_ids(1, 5), cache=DynamicCache(config=model.config))
