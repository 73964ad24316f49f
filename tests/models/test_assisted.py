"""A converted model as the assistant of another: it writes ahead, and goes back where the other disagrees."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert
from fastweights.models.cache import FastWeightsCache
from fastweights.models.decoding import set_fast_decoding
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama, random_ids

MODELS = {
    "pure": lambda: convert(make_gpt2(), ConversionConfig(positions="drop")),
    "pure llama": lambda: convert(make_llama(), ConversionConfig()),
    "hybrid": lambda: convert(make_llama(), ConversionConfig(window=8)),
    "gated delta": lambda: convert(make_llama(), ConversionConfig(window=8, rule="gated_delta", feature_map="elu+1")),
    "full attention": lambda: convert(make_llama(), ConversionConfig(window=8, layers="1")),
    "Fast Weight Layer": lambda: add_fast_weight_layer(convert(make_llama(), ConversionConfig(window=8))),
}


@pytest.fixture(params=["fast", "plain"])
def decoding(request):
    """By the short way for one token, where there is one, and by transformers' modules."""
    set_fast_decoding(request.param == "fast")
    yield request.param
    set_fast_decoding(True)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_goes_back_and_reads_on_as_if_it_had_not_been_further(model, decoding):
    ids, other = random_ids(1, 60), random_ids(1, 60, seed=1)
    expected = model(ids).logits[0]
    cache = FastWeightsCache(model.config)
    cache.save_states()
    model(ids[:, :20], cache=cache)
    for removed, draft in ((4, 7), (1, 4), (6, 6), (2, 9), (5, 5)):
        start = cache.get_seq_length()
        model(other[:, start : start + 2], cache=cache)  # what a draft begins with
        for i in range(start + 2, start + draft):
            model(other[:, i : i + 1], cache=cache)
        cache.crop(start - cache.get_seq_length())  # all of it is thrown away
        again, end = cache.get_seq_length(), start + draft
        assert again <= start
        close(model(ids[:, again : start + 3], cache=cache).logits[0], expected[again : start + 3])
        for i in range(start + 3, end):
            close(model(ids[:, i : i + 1], cache=cache).logits[0, 0], expected[i])
        cache.crop(-removed)  # some of it is
        again = cache.get_seq_length()
        assert again <= end - removed
        close(model(ids[:, again:end], cache=cache).logits[0], expected[again:end])


@torch.no_grad()
def test_a_state_that_was_not_kept_cannot_be_gone_back_to(model):
    cache = FastWeightsCache(model.config)
    model(random_ids(1, 9), cache=cache)
    with pytest.raises(FastWeightsError, match=r"with 9 tokens was to go back to 7, and has kept no state of then"):
        cache.crop(-2)
    with pytest.raises(FastWeightsError, match="tokens_to_remove is 2; allowed are 0 and negative numbers"):
        cache.crop(2)
    cache.crop(0)
    assert cache.get_seq_length() == 9


@torch.no_grad()
def test_few_states_are_kept_however_often_a_draft_is_right(model, decoding):
    cache, ids = FastWeightsCache(model.config), random_ids(1, 120)
    cache.save_states()
    for start in range(0, 120, 5):
        model(ids[:, start : start + 2], cache=cache)
        for i in range(start + 2, start + 5):
            model(ids[:, i : i + 1], cache=cache)
        cache.crop(0)
        assert len(cache._saved) <= 2
    for piece in (ids[:, :2], ids[:, :1], ids[:, :1]):  # and then is wrong from its first token on
        model(piece, cache=cache)
    cache.crop(-3)
    assert 110 < cache.get_seq_length() <= 121
    cache.reset()
    with pytest.raises(FastWeightsError, match="has kept no state of then"):
        cache.crop(-1)


@pytest.mark.parametrize("do_sample", [False, True])
@torch.no_grad()
def test_what_is_written_with_an_assistant_is_what_the_model_writes(model, decoding, do_sample):
    """In greedy search to the token; a sample is another, but as good."""
    torch.manual_seed(1)
    writer = make_gpt2(n_layer=1) if model.config.base.model_type == "gpt2" else make_llama(num_hidden_layers=1)
    ids = random_ids(1, 30)
    arguments = {"max_new_tokens": 25, "do_sample": do_sample, "eos_token_id": None}
    torch.manual_seed(2)
    written = writer.eval().generate(ids, assistant_model=model, **arguments)
    assert written.shape == (1, 55)
    if not do_sample:
        assert torch.equal(written, writer.generate(ids, **arguments))


@torch.no_grad()
def test_an_assistant_that_is_always_right_saves_the_other_its_steps(decoding):
    torch.manual_seed(0)
    writer = make_llama(max_position_embeddings=256)
    assistant = convert(deepcopy(writer), ConversionConfig(window=128)).eval()
    for layer in assistant.fast_attentions():
        layer.fast_scale.zero_()
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 5
    steps = []
    writer.register_forward_hook(lambda *_: steps.append(1))
    ids = random_ids(1, 30)
    expected = writer.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert len(steps) == 40
    steps.clear()
    written = writer.generate(
        ids, max_new_tokens=40, do_sample=False, eos_token_id=None, assistant_model=assistant, cache=DynamicCache()
    )
    assert torch.equal(written, expected)
    assert len(steps) <= 8


@torch.no_grad()
def test_of_a_few_tokens_as_many_logits_are_given_as_are_asked_for(model, decoding):
    cache, ids = FastWeightsCache(model.config), random_ids(1, 20)
    cache.save_states()
    expected = model(ids).logits
    model(ids[:, :14], cache=cache)
    close(model(ids[:, 14:17], cache=cache, logits_to_keep=1).logits, expected[:, 16:17])
    close(model(ids[:, 17:], cache=cache, logits_to_keep=torch.tensor([0, 2])).logits, expected[:, [17, 19]])
