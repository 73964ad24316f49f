from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.layers.eight_bits import rounded
from fastweights.models import convert
from fastweights.models.cache import (
    FastWeightsCache,
    HybridCacheLayer,
    PureCacheLayer,
    SlidingCacheLayer,
    detach,
    layer_tensors,
    state_bytes,
)
from fastweights.models.decoding import set_fast_decoding
from fastweights.models.rings import GrowingCacheLayer
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import make_gemma3, make_gpt2, make_llama, random_ids
from tests.models.checks import check_pieces_equal_one_pass
from tests.ops.problems import error

KINDS = {
    "pure": {},
    "hybrid": {"window": 8},
    "windows in eight bits": {"window": 8, "window_dtype": "int8"},
    "state in eight bits": {"state_dtype": "int8"},
    "all in eight bits": {"window": 8, "window_dtype": "int8", "state_dtype": "int8"},
}


def near(model) -> float:
    """What an output may be off: a state that was rounded between two calls is another than in one pass."""
    return 3e-2 if model.config.states_in_eight_bits else tolerances.FLOAT32


@pytest.fixture(params=KINDS)
def filled(request):
    model = convert(make_gpt2(), ConversionConfig(**KINDS[request.param])).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(3, 20), cache=cache)
    return model, cache


def test_layers_are_ours_and_stay_what_they_are(filled):
    model, cache = filled
    kind = HybridCacheLayer if model.config.settings.window else PureCacheLayer
    assert all(isinstance(layer, kind) for layer in cache.layers)
    layers = list(cache.layers)
    FastWeightsCache.over(cache, model.config)
    assert cache.layers == layers


def test_length_and_bytes(filled):
    model, cache = filled
    assert cache.get_seq_length() == 20
    row = 16 + 1 if model.config.states_in_eight_bits else 16 * 4
    state = 3 * 3 * 2 * 16 * row  # layers, rows, heads, K
    token = 16 + 1 if model.config.windows_in_eight_bits else 16 * 4
    window = 3 * 3 * 2 * (7 * token + 4 * 16 * 4) * 2 if model.config.settings.window else 0  # 4 sinks
    assert state_bytes(cache) == state + window


@torch.no_grad()
def test_reordered_rows_go_on_as_the_rows_they_are(filled):
    model, cache = filled
    token = random_ids(3, 1, seed=5)
    order = torch.tensor([2, 2, 0])
    cache.reorder_cache(order)
    after = model(token, cache=cache).logits
    expected = model(torch.cat([random_ids(3, 20)[order], token], 1)).logits[:, -1:]
    assert error(after, expected) <= near(model)


@torch.no_grad()
def test_padded_rows_go_on_as_the_rows_they_are(filled):
    model, _ = filled
    ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[2, 15:] = 0
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, cache=cache)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    token = random_ids(2, 1, seed=5)
    mask = torch.cat((mask[[2, 0]], torch.ones(2, 1, dtype=torch.long)), 1)
    after = model(token, attention_mask=mask, cache=cache).logits[:, 0]
    for row, (of, length) in enumerate(((2, 15), (0, 20))):
        alone = model(torch.cat((ids[of : of + 1, :length], token[row : row + 1]), 1)).logits[0, -1]
        assert error(after[row], alone) <= near(model)


@torch.no_grad()
def test_repeated_and_selected_rows(filled):
    model, cache = filled
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 4]))
    token = random_ids(2, 1, seed=5)
    expected = model(torch.cat([random_ids(3, 20)[[0, 2]], token], 1)).logits[:, -1:]
    assert error(model(token, cache=cache).logits, expected) <= near(model)


@torch.no_grad()
def test_a_reset_cache_is_as_new(filled):
    model, cache = filled
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = random_ids(3, 9, seed=2)
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_a_recurrent_state_is_not_cropped(filled):
    _, cache = filled
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)


@torch.no_grad()
def test_the_cache_of_another_model_is_refused(filled):
    model, cache = filled
    others = [ConversionConfig(window=0 if model.config.settings.window else 8), ConversionConfig(window=5)]
    for config in others:
        with pytest.raises(FastWeightsError, match="the cache is another model's"):
            convert(make_gpt2(), config)(random_ids(3, 2), cache=cache)
    teacher = make_gpt2()
    with pytest.raises(FastWeightsError, match="DynamicLayer with tokens in it"):
        model(random_ids(3, 2), cache=teacher(random_ids(3, 5), use_cache=True).cache)
    cache.reset()
    for config in others:  # as new, it may be any model's
        other = convert(make_gpt2(), config).eval()
        expected = other(random_ids(3, 6)).logits
        assert error(other(random_ids(3, 6), cache=cache).logits, expected) <= tolerances.FLOAT32
        cache.reset()


def test_a_cache_under_another_name_is_refused(filled):
    model, cache = filled
    softmax = convert(make_gpt2(), ConversionConfig(layer_types=["full_attention"] * 3))
    for one in (model, softmax):
        with pytest.raises(FastWeightsError, match="a cache was given as past_key_value: give it as cache"):
            one(random_ids(3, 1), past_key_value=cache)


@torch.no_grad()
def test_past_key_values_is_the_former_name(filled):
    model, cache = filled
    ids = random_ids(3, 2)
    for part, output in ((model, "logits"), (model.model, "last_hidden_state")):
        expected = part(ids, cache=deepcopy(cache))[output]
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            found = part(ids, past_key_values=deepcopy(cache))
        assert found[output].equal(expected)
        assert found.cache.get_seq_length() == 22


def test_states_and_activation_checkpointing_do_not_go_together(filled):
    """transformers' checkpointed layers drop their cache."""
    model, cache = filled
    model = model.train()
    model.activation_checkpointing_enable()
    for given in ({"cache": cache}, {"use_cache": True}):
        with pytest.raises(FastWeightsError, match="activation checkpointing, which keeps no states"):
            model(random_ids(3, 2), **given)
    model(random_ids(3, 2), use_cache=False)


@pytest.mark.parametrize("length", [9, 3])
def test_masks_of_another_length_are_refused(filled, length):
    model, cache = filled
    for given in ({}, {"cache": cache}):
        with pytest.raises(FastWeightsError, match=r"attention_mask is of shape .* it must be \(3, 7\)"):
            model(random_ids(3, 7), attention_mask=torch.ones(3, length).long(), **given)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_a_mask_of_the_new_tokens_alone(kind):
    types = [kind, "full_attention", "linear_attention"]
    model = convert(make_gpt2(), ConversionConfig(layer_types=types)).eval()
    ids = random_ids(2, 13)
    cache = model(ids[:, :6], use_cache=True).cache
    found = model(ids[:, 6:], attention_mask=torch.ones(2, 7).long(), cache=cache).logits
    assert error(found, model(ids).logits[:, 6:]) <= tolerances.FLOAT32


@torch.no_grad()
def test_a_wider_window_in_the_config_is_for_the_next_time(tmp_path):
    model = convert(make_gpt2(), ConversionConfig(window=4)).eval()
    model.config.sliding_window = 8
    with pytest.raises(FastWeightsError, match="save it, and what is loaded has the others"):
        model(random_ids(1, 4))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.fast_attentions()[0].window == 8
    check_pieces_equal_one_pass(loaded, tuple(range(1, 40)))
    loaded.config.conversion["window_dtype"] = "int8"
    with pytest.raises(FastWeightsError, match="window_dtype is another than the model was made with"):
        loaded(random_ids(1, 4))


@pytest.fixture(params=["none", "1"])
def softmax(request):
    """A model that keeps the keys and values of its softmax layers in eight bits."""
    return convert(make_llama(), ConversionConfig(softmax_dtype="int8", layers=request.param)).eval()


@torch.no_grad()
def test_softmax_layers_in_eight_bits(softmax):
    ids, other, cache = random_ids(3, 20), random_ids(3, 4, seed=5), DynamicCache()
    softmax(ids, cache=cache)
    growing = [layer for layer in cache.layers if isinstance(layer, GrowingCacheLayer)]
    assert len(growing) == softmax.config.layer_types.count("full_attention")
    assert cache.get_seq_length() == growing[0].get_seq_length() == 20
    token = 2 * softmax.config.num_key_value_heads * (softmax.config.head_dim + 1)
    assert {sum(x.nbytes for x in layer_tensors(layer).values()) for layer in growing} == {3 * 20 * token}
    expected = softmax(torch.cat((ids, other), 1)).logits[:, -4:]
    assert error(softmax(other, cache=deepcopy(cache)).logits, expected) <= tolerances.FLOAT32
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 4]))
    assert error(softmax(other[[2, 0]], cache=cache).logits, expected[[2, 0]]) <= tolerances.FLOAT32
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(softmax(ids, cache=cache).logits, softmax(ids).logits, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_softmax_layers_in_eight_bits_generate_the_same_with_and_without_steps_of_their_own(softmax):
    ids, found = random_ids(2, 12), []
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    for fast in (True, False):
        set_fast_decoding(fast)
        found.append([softmax.generate(ids, num_beams=beams, **arguments).tolist() for beams in (1, 2)])
    set_fast_decoding(True)
    assert found[0] == found[1]
    with pytest.raises(FastWeightsError, match="a static cache was given"):
        softmax.generate(ids, cache_implementation="static", **arguments)


def test_softmax_layers_in_eight_bits_go_on_from_a_call_with_gradients(softmax):
    ids = random_ids(1, 16)
    cache = softmax(ids[:, :12], use_cache=True).cache
    with torch.no_grad():
        expected = softmax(ids).logits[:, 12:]
        found = torch.cat([softmax(ids[:, i : i + 1], cache=cache).logits for i in range(12, 16)], 1)
    assert cache.decoding is not None
    assert error(found, expected) <= tolerances.FLOAT32
    plain = softmax(ids[:, :12], use_cache=True).cache
    with torch.no_grad():
        assert error(softmax(ids[:, 12:], cache=plain).logits, expected) <= tolerances.FLOAT32
    layers = [layer for each in (cache, plain) for layer in each.layers if isinstance(layer, GrowingCacheLayer)]
    assert all("keys_codes" in layer_tensors(layer) for layer in layers)


@torch.no_grad()
def test_softmax_layers_in_eight_bits_may_be_put_away(softmax):
    ids = random_ids(1, 16)
    cache, other = FastWeightsCache(softmax.config), FastWeightsCache(softmax.config)
    for each in (cache, other):
        softmax(ids[:, :12], cache=each)
    for layer in other.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(*(softmax(ids[:, 12:], cache=each).logits for each in (cache, other)))


@torch.no_grad()
def test_an_unused_cache_of_another_dtype_is_taken(softmax):
    plain = convert(make_llama(), replace(softmax.config.settings, softmax_dtype="auto")).eval()
    cache = FastWeightsCache(softmax.config)
    plain(random_ids(1, 4), cache=cache)
    assert not any(isinstance(layer, GrowingCacheLayer) for layer in cache.layers)


def test_softmax_layers_in_eight_bits_let_gradients_through(softmax):
    x = torch.randn(1, 12, softmax.config.hidden_size, dtype=torch.float64, requires_grad=True)
    model = softmax.double()
    cache = model(inputs_embeds=x[:, :6], use_cache=True).cache
    (gradient,) = torch.autograd.grad(model(inputs_embeds=x[:, 6:], cache=cache).logits[:, -1].sum(), x)
    assert gradient[:, :6].abs().max() > 1e-6
    cache = model(inputs_embeds=x[:, :6], use_cache=True).cache
    detach(cache)
    with torch.no_grad():
        model(inputs_embeds=x[:, 6:], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 5])
def test_windows_of_softmax_layers_in_eight_bits(window):
    layer, keys = SlidingCacheLayer(window, eight_bits=True), torch.randn(2, 3, 12, 40)
    seen = torch.cat([layer.update(part, part)[0][:, :, -part.shape[2] :] for part in keys.split((7, 1, 4), 2)], 2)
    assert torch.equal(seen, rounded(keys))
    room = min(12, window - 1)
    assert torch.equal(layer.keys, rounded(keys)[:, :, 12 - room :])
    assert sum(x.untyped_storage().nbytes() for x in layer_tensors(layer).values()) <= 2 * 2 * 3 * room * (40 + 2)


@torch.no_grad()
def test_what_softmax_layers_keep_is_of_layers_that_there_are():
    with pytest.raises(FastWeightsError, match="softmax_dtype is int8 and no layer keeps its softmax attention"):
        convert(make_llama(), ConversionConfig(softmax_dtype="int8"))


@torch.no_grad()
def test_a_cache_with_a_state_of_another_dtype_is_refused():
    cache = DynamicCache(config=(model := convert(make_gpt2())).config)
    model(random_ids(1, 4), cache=cache)
    with pytest.raises(FastWeightsError, match="the cache is another model's"):
        convert(make_gpt2(), ConversionConfig(state_dtype="int8"))(random_ids(1, 4), cache=cache)


@pytest.mark.parametrize("window", [0, 8])
def test_a_state_that_wants_a_gradient_is_not_rounded(window):
    settings = ConversionConfig(window=window, rule="gated_delta")
    ids, logits = random_ids(1, 24), []
    for few in (False, True):
        model = convert(make_gpt2(), replace(settings, state_dtype="int8" if few else "auto")).eval()
        cache = model(ids[:, :12], use_cache=True).cache
        assert cache.layers[0].exponents is None
        logits.append(model(ids[:, 12:], cache=cache).logits)
    assert torch.equal(*logits)
    detach(cache)
    with torch.no_grad():
        model(ids[:, :3], cache=cache)
    assert cache.layers[0].exponents is not None


@pytest.mark.parametrize("settings", [KINDS["windows in eight bits"], KINDS["all in eight bits"]])
def test_derivatives_forward_go_through_eight_bits(settings):
    """As gradients do, over the pieces of a text."""
    model = convert(make_gpt2(), ConversionConfig(**settings)).double().eval()
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    direction = torch.zeros_like(x)
    direction[:, :6] = torch.randn(1, 6, 32)

    def last(x):
        cache = model(inputs_embeds=x[:, :6], use_cache=True).cache
        return model(inputs_embeds=x[:, 6:], cache=cache).logits[:, -1]

    with sdpa_kernel(SDPBackend.MATH):  # torch's others have no derivatives forward
        _, tangent = torch.func.jvp(last, (x,), (direction,))
    wanted = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(last(wanted).sum(), wanted)
    assert tangent.abs().max() > 1e-6
    torch.testing.assert_close(tangent.sum(), (gradient * direction).sum(), rtol=1e-6, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_after_what_a_cache_is_not_said_to_hold(side):
    """A layer with a window of its own sees beyond where the cache is said to begin."""
    model = convert(make_gemma3()).eval()
    ids, mask = random_ids(2, 40), torch.ones(2, 20, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(17, 20)] = 0
    cache = FastWeightsCache(model.config)
    model(ids[:, :20], cache=cache)
    cache.begin_here()
    assert cache.get_seq_length() == 0
    found = model(ids[:, 20:], attention_mask=mask, cache=cache).logits
    whole = torch.cat((torch.ones(2, 20, dtype=torch.long), mask), 1)
    expected = model(ids, attention_mask=whole).logits[:, 20:]
    assert error(found[mask.bool()], expected[mask.bool()]) <= tolerances.FLOAT32
