"""A hybrid model beside what it is made of."""

from contextlib import suppress

import pytest
import torch

from fastweights.data import tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import (
    PARTS,
    evaluate_parts,
    is_hybrid,
    parts,
    untrained_window,
    without_fast_weights,
    without_window,
)
from fastweights.evaluation.perplexity import evaluate
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import EvaluationConfig
from tests.conftest import make_gpt2, random_ids

MIXED = ["hybrid_sliding", "linear_attention", "full_attention"]


def make_hybrid(base, **settings):
    """With factors as training leaves them: each another."""
    model = convert(base, ConversionConfig(**{"window": 8, **settings})).eval()
    for layer in model.fast_attentions():
        layer.fast_scale.data.normal_(generator=torch.Generator().manual_seed(1))
        if layer.window_scale is not None:
            layer.window_scale.data.normal_(1, 0.1, generator=torch.Generator().manual_seed(2))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("without", "part"), [(without_fast_weights, 0), (without_window, 1)], ids=["fast weights", "window"]
)
@pytest.mark.parametrize("layer_types", [None, MIXED], ids=["all hybrid", "mixed"])
def test_what_is_left_out_says_nothing_and_the_rest_what_it_said(base, without, part, layer_types, monkeypatch):
    model, ids = make_hybrid(base, layer_types=layer_types), random_ids(2, 24)
    with without(model) as left:
        assert left is model
        found = model(input_ids=ids).logits
    layer = type(model.fast_attentions()[0])
    read = layer.read

    def read_without(*arguments):
        parts = list(read(*arguments))
        if parts[part] is not None:
            parts[part] = torch.zeros_like(parts[part])
        return tuple(parts)

    whole = model(input_ids=ids).logits
    assert (whole - found).abs().max() > 1e-3
    monkeypatch.setattr(layer, "read", read_without)
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("without", [without_fast_weights, without_window])
def test_afterwards_the_model_is_what_it_was_bit_for_bit(base, without):
    model = make_hybrid(base)
    layer = model.fast_attentions()[0]
    layer.fast_scale.requires_grad_(False)
    layer.fast_scale.data[0] = -0.0
    before = {name: (x, x.detach().clone(), x.requires_grad) for name, x in model.named_parameters()}
    with suppress(KeyboardInterrupt), without(model):
        assert not all(torch.equal(x, before[name][1]) for name, x in model.named_parameters())
        raise KeyboardInterrupt
    for name, x in model.named_parameters():
        same, value, requires_grad = before[name]
        assert x is same
        assert x.requires_grad == requires_grad
        assert torch.equal(x.view(torch.int32), value.view(torch.int32))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "drop"])
def test_the_untrained_window_is_the_teacher_that_sees_no_farther(base, positions):
    model, ids = make_hybrid(base, window=24, positions=positions), random_ids(2, 24)
    with untrained_window(model, base) as window:
        torch.testing.assert_close(window(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    with untrained_window(make_hybrid(base, window=8, sinks=0), base) as window:
        other = ids.clone()
        other[:, :2] = (ids[:, :2] + 1) % 256  # beyond the reach of three windows of 8
        assert torch.equal(window(input_ids=ids).logits[:, -1], window(input_ids=other).logits[:, -1])
        assert (base(input_ids=ids).logits[:, -1] - base(input_ids=other).logits[:, -1]).abs().max() > 1e-3


def test_each_part_is_evaluated_on_the_same_text(tokenizer):
    base = make_gpt2()
    model = make_hybrid(base)
    text = tokenize(["a text of some length " * 8], tokenizer)
    config = EvaluationConfig(max_tokens=100)
    found = evaluate_parts(model, base, text, block_size=32, config=config)
    assert list(found) == ["all", *PARTS]
    assert {evaluation.tokens for evaluation in found.values()} == {99}
    assert len({evaluation.loss for evaluation in found.values()}) == 5
    for name, reader in (("all", model), ("teacher", base)):
        assert found[name] == evaluate(reader, text, block_size=32, config=config)
    with without_fast_weights(model):
        assert found["window alone"] == evaluate(model, text, block_size=32, config=config)
    with without_window(model):
        assert found["fast weights alone"] == evaluate(model, text, block_size=32, config=config)
    with untrained_window(model, base) as window:
        assert found["untrained window"] == evaluate(window, text, block_size=32, config=config)


@pytest.mark.parametrize("convert_it", [False, True])
def test_other_models_have_no_parts(convert_it):
    base = make_gpt2()
    model = convert(base) if convert_it else base
    assert not is_hybrid(model)
    with pytest.raises(FastWeightsError, match="no parts"):
        parts(model, base)
