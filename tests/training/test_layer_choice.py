"""Which layers keep their attention."""

import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import without_fast_weights
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.blocks import TokenBlocks
from fastweights.training.finetune import divergence
from fastweights.training.layer_choice import choose_layers, layer_divergences
from tests.conftest import random_ids

LENGTH = 48
OUTPUTS = ("attn.o_proj", "attn.c_proj")


@pytest.fixture
def blocks():
    return TokenBlocks(random_ids(1, 6 * LENGTH)[0], LENGTH, [LENGTH + 20, 5 * LENGTH - 20])


def silence(model, layer):
    """A layer whose attention adds nothing."""
    parts = (module for name, module in model.named_modules() if f".{layer}." in name and name.endswith(OUTPUTS))
    next(parts).weight.data.zero_()


@torch.no_grad()
def test_a_layer_that_says_nothing_is_not_missed(base, blocks):
    silence(base, 1)
    found = layer_divergences(base, ConversionConfig(window=4, sinks=0), blocks)
    assert len(found) == 3
    assert found[1] < 1e-6 < min(found[0], found[2])


@torch.no_grad()
def test_a_divergence_is_that_of_the_window_alone(base, blocks):
    found = layer_divergences(base, ConversionConfig(window=4), blocks)
    for layer in range(3):
        types = ["full_attention"] * 3
        types[layer] = "hybrid_sliding"
        model = convert(base, ConversionConfig(window=4, layer_types=types)).eval()
        each = []
        with without_fast_weights(model):
            for block in (blocks[0], blocks[1], blocks[3], blocks[4]):
                read = {name: block[name][None] for name in ("input_ids", "position_ids")}
                each.append(divergence(model(**read).logits, base(**read, use_cache=False).logits))
        assert found[layer] == pytest.approx(torch.stack(each).mean().item(), rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("settings", [{"window": 4}, {}, {"positions": "drop"}], ids=["hybrid", "pure", "dropped"])
def test_those_that_are_missed_most_stay(base, blocks, settings):
    told = []
    before = {name: x.clone() for name, x in base.state_dict().items()}
    chosen, found = choose_layers(
        base, ConversionConfig(layers="auto:1", **settings), blocks, lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    stays = [i for i, kind in enumerate(chosen.layer_types) if kind == "full_attention"]
    assert stays == [max(range(3), key=lambda i: found[i])]
    assert chosen.layers is None
    assert all(torch.equal(before[name], x) for name, x in base.state_dict().items())
    assert len(convert(base, chosen).fast_attentions()) == 2


def test_no_layer_left_to_convert_is_refused(base, blocks):
    with pytest.raises(FastWeightsError, match="layers is auto:3; the model has 3: keep at most 2"):
        choose_layers(base, ConversionConfig(layers="auto:3"), blocks)


@pytest.mark.parametrize(
    ("layers", "converted"), [("0,2", [0, 2]), ("1-2", [1, 2]), ("0-0,2", [0, 2]), (None, [0, 1, 2])]
)
def test_named_layers_are_converted(base, layers, converted):
    model = convert(base, ConversionConfig(layers=layers, window=4))
    assert [layer.layer_idx for layer in model.fast_attentions()] == converted


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"layers": "0,x"}, "layers is 0,x; allowed are numbers such as 0,4-9, and auto:N"),
        ({"layers": ""}, "allowed are numbers such as"),
        ({"layers": "2-1"}, "the base model has layers 0 to 2"),
        ({"layers": "1-3"}, "layers is 1-3; the base model has layers 0 to 2"),
        ({"layers": "auto:1"}, "takes a model and a text: use fastweights convert"),
        ({"layers": "0", "layer_types": ["linear_attention"] * 3}, "leave one out"),
    ],
)
def test_layers_that_are_none_are_refused(base, settings, line):
    with pytest.raises(FastWeightsError, match=line):
        convert(base, ConversionConfig(**settings))
