"""Which layers keep their attention."""

import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import without_fast_weights
from fastweights.models import convert, load_model
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.blocks import TokenBlocks
from fastweights.training.layer_choice import choose_layers, layer_divergences
from fastweights.training.next_token import divergence
from tests.conftest import make_gpt2, make_llama, make_opt, make_qwen3, random_ids

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
    with pytest.raises(FastWeightsError, match="has fast weights already; give the model that it was converted from"):
        choose_layers(convert(base), ConversionConfig(layers="auto:1"), blocks)
    with pytest.raises(FastWeightsError, match="layers is auto:3; the model has 3 to convert: keep at most 2"):
        choose_layers(base, ConversionConfig(layers="auto:3"), blocks)


@pytest.mark.parametrize("make", [make_gpt2, make_opt])
def test_blocks_beyond_absolute_positions_are_refused(make):
    blocks = TokenBlocks(random_ids(1, 400)[0], 200)
    with pytest.raises(FastWeightsError, match="block_size is 200; this model's absolute positions end at 128"):
        choose_layers(make(), ConversionConfig(layers="auto:1"), blocks)


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
        ({"layers": "0,2-1"}, "layers is 0,2-1; the base model has layers 0 to 2"),
        ({"layers": "0-99999999999"}, "the base model has layers 0 to 2"),
        ({"layers": "1-3"}, "layers is 1-3; the base model has layers 0 to 2"),
        ({"layers": "auto:1"}, "takes a model and a text: use fastweights convert"),
        ({"layers": "0", "layer_types": ["linear_attention"] * 3}, "leave one out"),
    ],
)
def test_layers_that_are_none_are_refused(base, settings, line):
    with pytest.raises(FastWeightsError, match=line):
        convert(base, ConversionConfig(**settings))


def test_layers_left_out_have_the_wide_window(base, blocks):
    settings = ConversionConfig(window=4, wide_window=12, layers="0,2")
    model = convert(base, settings)
    assert model.config.layer_types == ["hybrid_sliding"] * 3
    assert model.config.windows == [layer.window for layer in model.fast_attentions()] == [4, 12, 4]
    chosen, found = choose_layers(base, ConversionConfig(window=4, wide_window=12, layers="auto:1"), blocks)
    assert chosen.windows.index(12) == max(range(3), key=lambda i: found[i])
    narrow, _ = choose_layers(base, ConversionConfig(window=4, layers="auto:1"), blocks)
    assert [kind == "full_attention" for kind in narrow.layer_types] == [window == 12 for window in chosen.windows]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"wide_window": 8}, "wide_window is 8 and window 0"),
        ({"wide_window": 8, "window": 8, "layers": "0"}, "it is for layers with a longer one"),
        ({"wide_window": 8, "window": 4}, "say by layers which have the usual one"),
        ({"windows": [4, 8, 1], "window": 4}, r"windows is \[4, 8, 1\]; allowed are 0 \(none\) and 2 or more"),
        ({"windows": [4, 8], "window": 4}, "there must be one for each of hybrid_sliding, hybrid_sliding, hybrid_sl"),
        ({"windows": [4, 0, 4], "window": 4}, "there must be one for each of"),
        ({"windows": [6, 8, 6], "window": 4}, r"window is 4 and windows \[6, 8, 6\]: give one that some layer has"),
    ],
)
def test_windows_that_are_none_are_refused(base, settings, line):
    with pytest.raises(FastWeightsError, match=line):
        convert(base, ConversionConfig(**settings))


@torch.no_grad()
def test_each_layer_has_its_own_window_in_passes_and_steps(tmp_path):
    """Equal in one pass and token by token; saved and loaded; and a layer's window reaches as far as it says."""
    base = make_llama()
    settings = ConversionConfig(window=4, sinks=2, windows=[4, 12, 6])
    model = convert(base, settings).eval()
    ids = random_ids(2, 40)
    whole = model(input_ids=ids).logits
    cache, steps = None, []
    for piece in ids.split([7, 1, 1, 14, 1, 16], 1):
        outputs = model(input_ids=piece, cache=cache, use_cache=True)
        cache = outputs.cache
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 11, 5]
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.windows == [4, 12, 6]
    torch.testing.assert_close(loaded(input_ids=ids).logits, whole)
    for window, layer in zip((4, 12, 6), model.fast_attentions(), strict=True):
        x = torch.randn(1, 30, base.config.hidden_size)
        at = torch.arange(30)[None]
        embeddings = model.model.base.rotary_emb(x, at), model.model.sink_embeddings(x)
        changed = x.clone()
        changed[:, 29 - window] += 1  # the last token to leave
        _, before = layer.read(x, None, *embeddings)
        _, after = layer.read(changed, None, *embeddings)
        differs = (before != after).flatten(2).any(-1)[0]
        assert differs[29 - window : 29].all()
        assert not differs[29]


@pytest.mark.parametrize(
    ("window", "windows", "wide"), [(8, [8, 12, 0], 12), (12, [12, 12, 0], 0), (16, [16, 16, 0], 0)]
)
def test_another_window_leaves_the_wide_one_while_it_is_the_wider(window, windows, wide):
    settings = ConversionConfig(window=4, wide_window=12, layers="0").for_layers(3, local=[2])
    other = settings.with_window(window)
    assert (other.window, other.windows, other.wide_window) == (window, windows, wide)
    assert other.for_layers(3) == other


@torch.no_grad()
def test_layers_with_a_window_of_their_own_stay_as_they_are(blocks):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    base = make_qwen3(layer_types=kinds, use_sliding_window=True, sliding_window=4)
    chosen, found = choose_layers(base, ConversionConfig(window=4, wide_window=12, layers="auto:1"), blocks)
    assert (found[0], chosen.windows[0], chosen.layer_types[0]) == (0, 0, "full_attention")
    assert sorted(chosen.windows[1:]) == [4, 12]
    assert convert(base, ConversionConfig(window=4)).config.windows == [0, 4, 4]
