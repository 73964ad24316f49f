"""Models with a short convolution keep the promises of those without: its tail is part of what a cache holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import convert, load_model
from fastweights.models.cache import FastWeightsCache, detach, state_bytes
from fastweights.models.decoding import set_fast_decoding
from fastweights.reading.memory import load_memory, new_memory
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.finetune import leave_windows_alone
from tests import tolerances
from tests.conftest import make_gpt2, make_llama, random_ids
from tests.models.checks import (
    PADDING,
    check_a_padded_batch_generates_what_each_row_does_alone,
    check_padding_gives_each_row_what_it_has_alone,
    check_pieces_equal_one_pass,
)
from tests.models.test_documents import LENGTHS, borders, packed
from tests.ops.problems import error

KINDS = {
    "pure": lambda: convert(make_llama(), ConversionConfig(rule="gated_delta", conv_size=4)),
    "hybrid": lambda: convert(make_gpt2(), ConversionConfig(window=8, conv_size=3, positions="drop")),
}


def make(kind: str):
    """With taps that say something."""
    model = KINDS[kind]().eval()
    torch.manual_seed(0)
    for attention in model.fast_attentions():
        attention.convolution.weight.data += 0.5 * torch.randn_like(attention.convolution.weight)
    return model


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


@pytest.fixture(autouse=True)
def _fast():
    yield
    set_fast_decoding(True)


@torch.no_grad()
def test_it_starts_as_the_model_without_and_says_something_then(model):
    without = convert(make_llama(), ConversionConfig(rule="gated_delta"))
    new = KINDS["pure"]()
    ids = random_ids(2, 20)
    new.load_state_dict(without.state_dict(), strict=False)
    assert error(new(ids).logits, without(ids).logits) <= tolerances.FLOAT32
    for attention in model.fast_attentions():
        attention.reset_new_parameters()
        assert (attention.convolution.weight.sum(1) == 1).all()


def test_pieces_of_any_size_equal_one_pass(model):
    check_pieces_equal_one_pass(model, (1, 2, 8, 9, 25))


@pytest.mark.parametrize("where", PADDING)
def test_padding_gives_each_row_what_it_has_alone(model, where):
    check_padding_gives_each_row_what_it_has_alone(model, where)


def test_a_padded_batch_generates_what_each_row_does_alone(model):
    check_a_padded_batch_generates_what_each_row_does_alone(model)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_document_is_what_it_is_alone(model, use_cache):
    documents, row, positions = packed()
    together = model(row, use_cache=use_cache, **borders(positions)["seq_idx"]).logits
    for document, found in zip(documents, together.split(LENGTHS, 1), strict=True):
        assert error(found, model(document).logits) <= tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
def test_rows_change_places(model, fast):
    """As in beam search, and for several answers to one prompt."""
    set_fast_decoding(fast)
    ids, cache = random_ids(3, 30), FastWeightsCache(model.config)
    model(ids[:, :20], cache=cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    then = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(20, 30)], 1)
    expected = model(torch.cat((ids[order, :20], ids[:, 20:]), 1)).logits[:, 20:]
    assert error(then, expected) <= tolerances.FLOAT32
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 4]))
    more = model(ids[:, :1], cache=cache).logits
    assert error(more, model(torch.cat((ids[order, :20], ids[:, 20:], ids[:, :1]), 1)).logits[:, -1:]) <= 1e-4
    cache.reset()
    assert error(model(ids, cache=cache).logits, model(ids).logits) <= tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
def test_a_cache_goes_back(model, fast):
    set_fast_decoding(fast)
    ids, other = random_ids(1, 40), random_ids(1, 40, seed=1)
    expected = model(ids).logits
    cache = FastWeightsCache(model.config)
    cache.save_states()
    model(ids[:, :20], cache=cache)
    model(other[:, 20:22], cache=cache)
    for i in range(22, 26):
        model(other[:, i : i + 1], cache=cache)
    cache.crop(20 - cache.get_seq_length())
    again = cache.get_seq_length()
    found = [model(ids[:, again:25], cache=cache).logits]
    found += [model(ids[:, i : i + 1], cache=cache).logits for i in range(25, 40)]
    assert error(torch.cat(found, 1), expected[:, again:]) <= tolerances.FLOAT32


@torch.no_grad()
def test_single_tokens_and_more_at_once_in_turns(model):
    ids, cache = random_ids(2, 40), DynamicCache()
    cuts, found, size = (5, 6, 7, 12, 13, 14, 15, 40), [], []
    for start, stop in zip((0, *cuts), cuts, strict=False):
        output = model(ids[:, start:stop], cache=cache, use_cache=True)
        found.append(output.logits)
        size.append(state_bytes(output.cache))
        cache = output.cache
    assert error(torch.cat(found, 1), model(ids).logits) <= tolerances.FLOAT32
    tails = [layer.tail() for layer in cache.layers]
    assert [tail.shape[2] for tail in tails] == [model.config.settings.conv_size - 1] * 3
    channels = model.fast_attentions()[0].convolution.weight.shape[0]
    assert all(tail.shape[:2] == (2, channels) for tail in tails)


def test_what_one_call_leaves_is_cut_off_by_detach(model):
    cache = model(random_ids(1, 9), use_cache=True).cache
    assert all(layer.tail().requires_grad for layer in cache.layers[1:])
    detach(cache)
    assert not any(layer.tail().requires_grad for layer in cache.layers)


def test_a_memory_holds_the_tail(model, tmp_path):
    ids, arguments = random_ids(1, 60)[0], {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    file = new_memory(model).read([ids[:33]]).save(tmp_path / "memory")
    loaded = load_memory(model, file).read([ids[33:]])
    whole = new_memory(model).read([ids])
    assert loaded.generate(**arguments).tolist() == whole.generate(**arguments).tolist()
    for ours, theirs in zip(loaded.cache.layers, whole.cache.layers, strict=True):
        torch.testing.assert_close(ours.tail(), theirs.tail())


@torch.no_grad()
def test_a_folder_in_bf16_keeps_its_taps(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    for ours, theirs in zip(loaded.fast_attentions(), model.fast_attentions(), strict=True):
        assert ours.convolution.weight.dtype == torch.float32
        assert torch.equal(ours.convolution.weight, theirs.convolution.weight)
    assert loaded.generate(random_ids(1, 5), max_new_tokens=3, eos_token_id=None).shape == (1, 8)


def test_windows_alone_have_it_too():
    model = make("hybrid")
    leave_windows_alone(model)
    assert all(attention.convolution.weight.requires_grad for attention in model.fast_attentions())
    assert not any(attention.rule.key_gate.weight.requires_grad for attention in model.fast_attentions())
    model(random_ids(1, 20), labels=random_ids(1, 20)).loss.backward()
    assert all(attention.convolution.weight.grad.any() for attention in model.fast_attentions())


@pytest.mark.parametrize("size", [1, -1])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(FastWeightsError, match=rf"conv_size is {size}; allowed are 0 \(none\) and 2 or more tokens"):
        ConversionConfig(conv_size=size)
