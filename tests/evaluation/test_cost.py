from types import SimpleNamespace

import pytest
import torch

from fastweights.evaluation.cost import caches_after, decode_costs, longest_that_fits
from fastweights.models import add_fast_weight_layer, convert
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama


@pytest.mark.parametrize("layer", [False, True], ids=["", "fast weight layer"])
def test_a_constant_state_costs_the_same_memory_whether_text_is_read_or_pretended(layer):
    model = convert(make_llama(), ConversionConfig(window=8))
    model = add_fast_weight_layer(model) if layer else model
    real = decode_costs({"": model}, [16, 300], tokens=2)[""]
    pretended = decode_costs({"": model}, [16, 300, 900, 1000], tokens=2, read_at_most=4)[""]
    assert [cost.context for cost in pretended] == [16, 300, 900, 1000]
    assert len({cost.state_bytes for cost in (*real, *pretended)}) == 1
    assert all(cost.ms_per_token > 0 for cost in pretended)


@torch.no_grad()
def test_no_more_is_read_than_fills_the_longest_window():
    model, read = convert(make_llama(), ConversionConfig(window=8)).eval(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    caches = caches_after(model, [10, 300, 900, 1000], at_most=4)
    most = 8 + model.config.sinks
    assert read == [10, most]
    assert [cache.get_seq_length() for cache in caches.values()] == [10, 300, 900, 1000]


def test_softmax_grows():
    models = {"softmax": make_gpt2(), "pure": convert(make_gpt2())}
    costs = decode_costs(models, [16, 64, 100], tokens=2, softmax_up_to=64)
    few, many = costs["softmax"]
    assert many.state_bytes == 4 * few.state_bytes
    assert len({cost.state_bytes for cost in costs["pure"]}) == 1
    assert [cost.context for cost in costs["pure"]] == [16, 64, 100]


@pytest.mark.parametrize(("room", "longest"), [(0, 0), (16, 16), (80, 64), (179, 64), (180, 100)])
def test_caches_of_all_contexts_have_to_fit_together(monkeypatch, room, longest):
    a_token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    free = SimpleNamespace(available=a_token * room / 0.8 + 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert longest_that_fits(make_llama(), [16, 64, 100]) == longest
