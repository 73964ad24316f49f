"""Models with a short convolution keep the promises of those without: its tail is part of what a cache holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.layers.convolution import ShortConvolution
from fastweights.models import convert, load_model
from fastweights.models.cache import FastWeightsCache, detach, state_bytes
from fastweights.models.decoding import set_fast_decoding, why_plain
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
    "pure": (make_llama, ConversionConfig(rule="gated_delta", conv_size=4)),
    "hybrid": (make_gpt2, ConversionConfig(window=8, conv_size=3, positions="drop")),
}


def with_taps(model):
    """Taps that say something."""
    torch.manual_seed(0)
    for attention in model.fast_attentions():
        attention.convolution.weight.data += 0.5 * torch.randn_like(attention.convolution.weight)
    return model


def make(kind: str):
    base, settings = KINDS[kind]
    return with_taps(convert(base(), settings)).eval()


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


@pytest.fixture(autouse=True)
def _fast():
    yield
    set_fast_decoding(True)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_starts_as_the_model_without_and_says_something_then(kind):
    base, settings = KINDS[kind]
    new, without = (convert(base(), replace(settings, conv_size=size)).eval() for size in (settings.conv_size, 0))
    ids = random_ids(2, 20)
    expected = without(ids).logits
    assert error(new(ids).logits, expected) <= tolerances.FLOAT32
    model = make(kind)
    assert error(model(ids).logits, expected) > 0.01
    for attention in model.fast_attentions():
        attention.reset_new_parameters()
    assert error(model(ids).logits, expected) <= tolerances.FLOAT32


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
    cuts, found, sizes = (5, 6, 7, 12, 13, 14, 15, 40), [], set()
    for start, stop in zip((0, *cuts), cuts, strict=False):
        output = model(ids[:, start:stop], cache=cache, use_cache=True)
        found.append(output.logits)
        cache = output.cache
        sizes.add(state_bytes(cache))
    assert error(torch.cat(found, 1), model(ids).logits) <= tolerances.FLOAT32
    tails = [layer.tail() for layer in cache.layers]
    assert [tail.shape[2] for tail in tails] == [model.config.settings.conv_size - 1] * 3
    channels = model.fast_attentions()[0].convolution.weight.shape[0]
    assert all(tail.shape[:2] == (2, channels) for tail in tails)
    if not model.config.windows[0]:
        assert sizes == {sum(layer.state().nbytes + layer.tail().nbytes for layer in cache.layers)}


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


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("ours", "theirs"), [(2, 8), (4, 2), (4, 0), (0, 4)])
def test_the_cache_of_another_convolution_is_refused(ours, theirs, tokens):
    models = [convert(make_llama(), ConversionConfig(window=8, conv_size=size)).eval() for size in (ours, theirs)]
    cache = models[1](random_ids(1, 20), use_cache=True).cache
    with pytest.raises(FastWeightsError, match="the cache is another model's; begin with a new one"):
        models[0](random_ids(1, tokens), cache=cache)


@torch.no_grad()
def test_rows_may_share_the_borders_of_their_documents(model):
    ids, starts = random_ids(2, 20), torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 7] = True
    expected = model(ids, document_starts=starts.expand(2, -1)).logits
    assert torch.equal(model(ids, document_starts=starts).logits, expected)


@torch.no_grad()
def test_another_kind_of_convolution_takes_the_plain_way(model):
    class Other(ShortConvolution):
        pass

    assert why_plain(model) is None
    attention = model.fast_attentions()[1]
    taps = attention.convolution.weight
    taps.data = taps.T.contiguous().T
    assert why_plain(model) == "the taps of its convolution lie apart in memory"
    attention.convolution = Other(*taps.shape)
    assert why_plain(model) == "its convolution is Other"


@pytest.mark.parametrize("size", [1, -1])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(FastWeightsError, match=rf"conv_size is {size}; allowed are 0 \(none\) and 2 or more tokens"):
        ConversionConfig(conv_size=size)
