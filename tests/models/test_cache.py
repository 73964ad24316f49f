import pytest
import torch
from transformers import DynamicCache

from fastweights.models import ConversionConfig, convert
from fastweights.models.cache import FastWeightsCache, HybridCacheLayer, PureCacheLayer, state_bytes
from tests import tolerances
from tests.conftest import make_gpt2, random_ids
from tests.ops.problems import error


@pytest.fixture(params=[0, 8], ids=["pure", "hybrid"])
def filled(request):
    model = convert(make_gpt2(), ConversionConfig(window=request.param)).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(3, 20), past_key_values=cache)
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
    state = 3 * 3 * 2 * 16 * 16 * 4  # layers, rows, heads, K, V, fp32
    window = 3 * 3 * 2 * 7 * 16 * 4 * 2 if model.config.settings.window else 0
    assert state_bytes(cache) == state + window


@torch.no_grad()
def test_reordered_rows_go_on_as_the_rows_they_are(filled):
    model, cache = filled
    token = random_ids(3, 1, seed=5)
    order = torch.tensor([2, 2, 0])
    cache.reorder_cache(order)
    after = model(token, past_key_values=cache).logits
    expected = model(torch.cat([random_ids(3, 20)[order], token], 1)).logits[:, -1:]
    assert error(after, expected) <= tolerances.FLOAT32


@torch.no_grad()
def test_padded_rows_go_on_as_the_rows_they_are(filled):
    model, _ = filled
    ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[2, 15:] = 0
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    token = random_ids(2, 1, seed=5)
    mask = torch.cat((mask[[2, 0]], torch.ones(2, 1, dtype=torch.long)), 1)
    after = model(token, attention_mask=mask, past_key_values=cache).logits[:, 0]
    for row, (of, length) in enumerate(((2, 15), (0, 20))):
        alone = model(torch.cat((ids[of : of + 1, :length], token[row : row + 1]), 1)).logits[0, -1]
        assert error(after[row], alone) <= tolerances.FLOAT32


@torch.no_grad()
def test_repeated_and_selected_rows(filled):
    model, cache = filled
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 4]))
    token = random_ids(2, 1, seed=5)
    expected = model(torch.cat([random_ids(3, 20)[[0, 2]], token], 1)).logits[:, -1:]
    assert error(model(token, past_key_values=cache).logits, expected) <= tolerances.FLOAT32


@torch.no_grad()
def test_a_reset_cache_is_as_new(filled):
    model, cache = filled
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = random_ids(3, 9, seed=2)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_a_recurrent_state_is_not_cropped(filled):
    _, cache = filled
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)
