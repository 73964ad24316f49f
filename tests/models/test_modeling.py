import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert
from fastweights.models.cache import FastWeightsCache, state_bytes
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama, random_ids
from tests.models.checks import (
    PADDING,
    check_a_padded_batch_generates_what_each_row_does_alone,
    check_padding_gives_each_row_what_it_has_alone,
    check_pieces_equal_one_pass,
)

KINDS = {
    "pure": ConversionConfig(),
    "hybrid": ConversionConfig(window=8),
    "mixed": ConversionConfig(window=8, layer_types=["linear_attention", "full_attention", "hybrid_sliding"]),
    "dropped positions": ConversionConfig(positions="drop"),
    "key gate only": ConversionConfig(value_gate=False),
}


@pytest.fixture(params=sorted(KINDS))
def model(base, request):
    return convert(base, KINDS[request.param]).eval()


def test_pieces_of_any_size_equal_one_pass(model):
    check_pieces_equal_one_pass(model, (7, 8, 9, 25))


@pytest.mark.parametrize("where", PADDING)
def test_padding_gives_each_row_what_it_has_alone(model, where):
    check_padding_gives_each_row_what_it_has_alone(model, where)


@torch.no_grad()
def test_a_mask_that_leaves_out_earlier_padding_is_refused(model):
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    more = random_ids(2, 4, seed=1)
    for given in (None, torch.ones(2, 4, dtype=torch.long)):
        with pytest.raises(FastWeightsError, match=r"among the 12 tokens .* of length 16"):
            model(more, attention_mask=given, cache=cache)
    cache.reset()
    model(more, attention_mask=torch.ones(2, 4, dtype=torch.long), cache=cache)


def test_padded_batch_generates_what_each_row_does_alone(model):
    check_a_padded_batch_generates_what_each_row_does_alone(model)


@torch.no_grad()
def test_beams_and_sampling(model):
    ids = random_ids(2, 10)
    arguments = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "eos_token_id": None,
        "pad_token_id": 256,
    }
    beams = model.generate(ids, num_beams=3, do_sample=False, **arguments)
    assert beams.tolist() == model.generate(ids, num_beams=3, do_sample=False, use_cache=False, **arguments).tolist()
    assert beams.tolist() != model.generate(ids, do_sample=False, **arguments).tolist()
    assert model.generate(ids, do_sample=True, top_k=5, **arguments).shape == (2, 22)


@torch.no_grad()
def test_generation_goes_on_from_a_warm_cache(model):
    ids = random_ids(1, 30)
    arguments = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    cold = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    cache = DynamicCache(config=model.config)
    model(ids[:, :17], cache=cache)
    warm = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **arguments)
    assert warm.tolist() == cold.tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_state_does_not_grow(base, kind):
    model = convert(base, KINDS[kind])
    cache = DynamicCache(config=model.config)
    sizes = []
    for _ in range(4):
        model(random_ids(1, 20), cache=cache)
        sizes.append(state_bytes(cache))
    assert sizes[1:] == sizes[:1] * 3


@torch.no_grad()
def test_a_masked_token_leaves_the_state_bit_for_bit(base):
    model = convert(base, KINDS["pure"])
    cache = DynamicCache(config=model.config)
    model(random_ids(2, 10), cache=cache)
    before = [layer.recurrent_states[0].clone() for layer in cache.layers]
    mask = torch.tensor([[1] * 10 + [0, 0, 0], [1] * 13])
    model(random_ids(2, 3, seed=3), cache=cache, attention_mask=mask)
    for old, layer in zip(before, cache.layers, strict=True):
        assert torch.equal(old[0], layer.recurrent_states[0][0])
        assert not torch.equal(old[1], layer.recurrent_states[0][1])


def test_saved_and_loaded_and_saved_again_is_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@torch.no_grad()
def test_bf16_keeps_gates_and_states_in_fp32(base, tmp_path):
    convert(base, KINDS["hybrid"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    new = set(model.new_parameter_names())
    assert {p.dtype for n, p in model.named_parameters() if n in new} == {torch.float32}
    assert {x.dtype for x in model.new_tensors().values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in new} == {torch.bfloat16}
    cache = DynamicCache(config=model.config)
    logits = model(random_ids(1, 20), cache=cache).logits
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    full = AutoModelForCausalLM.from_pretrained(tmp_path)(random_ids(1, 20)).logits
    assert (logits.float() - full).abs().max() / full.abs().max() < 0.1


def test_activation_checkpointing_changes_no_gradient(base):
    model = convert(base, KINDS["hybrid"]).train()
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-6)


def test_lora_trains_and_merges(base):
    peft = pytest.importorskip("peft")
    model = convert(base, KINDS["hybrid"])
    ids = random_ids(1, 20)
    target = ["c_attn"] if base.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_kept_positions_end_with_a_clear_line():
    model = convert(make_gpt2(), KINDS["pure"]).eval()
    with pytest.raises(FastWeightsError, match="absolute positions end at 128"):
        model(random_ids(1, 129))
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 128), cache=cache)
    with pytest.raises(FastWeightsError, match='positions="drop"'):
        model(random_ids(1, 1), cache=cache)
    cache = FastWeightsCache(model.config)
    model(random_ids(1, 128), cache=cache)
    cache.begin_here()
    with pytest.raises(FastWeightsError, match="absolute positions end at 128"):
        model(random_ids(1, 2), cache=cache)
    with pytest.raises(FastWeightsError, match="position_ids go up to 128 and this model's absolute positions end at"):
        model(random_ids(1, 2), position_ids=torch.tensor([[5, 128]]))
    with pytest.raises(FastWeightsError, match="absolute positions"):
        model.generate(random_ids(1, 120), max_new_tokens=20, do_sample=False, eos_token_id=None)


@torch.no_grad()
def test_no_positions_no_end():
    dropped = convert(make_gpt2(), KINDS["dropped positions"])
    rotary = convert(make_llama(), KINDS["hybrid"])
    for model in (dropped, rotary):
        assert model(random_ids(1, 400)).logits.isfinite().all()


def test_padding_on_the_left_does_not_count_as_position():
    model = convert(make_gpt2(), KINDS["pure"]).eval()
    ids, mask = random_ids(1, 160), torch.ones(1, 160, dtype=torch.long)
    mask[0, :40] = 0
    assert model(ids, attention_mask=mask).logits.shape == (1, 160, 257)


def test_assisted_decoding_is_refused_with_a_reason(model):
    ids = random_ids(1, 8)
    with pytest.raises(ValueError, match=r"(?i)stateful"):
        model.generate(ids, assistant_model=make_gpt2(), max_new_tokens=4, do_sample=False)


def test_the_vocabulary_can_grow(base):
    model = convert(base)
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == 300
    assert model(torch.full((1, 4), 299)).logits.shape == (1, 4, 300)


def test_tuples_instead_of_named_outputs(base):
    model = add_fast_weight_layer(convert(base))
    ids = random_ids(1, 9)
    torch.testing.assert_close(model(ids, return_dict=False)[0], model(ids).logits)


def test_forward_without_input(base):
    with pytest.raises(FastWeightsError, match="input_ids or inputs_embeds"):
        convert(base)()


def test_compiled_model_agrees():
    model = convert(make_gpt2(), KINDS["hybrid"]).eval()
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
