"""Which layers keep their attention."""

import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.models import convert, load_model
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.blocks import TokenBlocks
from fastweights.training.calibration import fit_layers
from fastweights.training.layer_choice import choose_layers
from fastweights.training.next_token import divergence
from fastweights.training.teacher import record_attention
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
@pytest.mark.parametrize("settings", [{"window": 4, "sinks": 0}, {}], ids=["hybrid", "pure"])
def test_a_layer_that_says_nothing_is_not_missed(base, blocks, settings):
    silence(base, 1)
    chosen, found = choose_layers(base, ConversionConfig(layers="auto:2", **settings), blocks)
    assert len(found) == 3
    assert abs(found[1]) < 1e-6 < max(found)
    assert chosen.layer_types[1] != "full_attention"


def divergence_of(base, blocks, kept, settings):
    """Of the windows alone in all layers but these, by one plain pass; of one layer of fast weights alone, fitted."""
    settings = ConversionConfig(**settings).converting(set(range(3)) - set(kept), 3)
    model, each = convert(base, settings).eval(), []
    chosen = (blocks[0], blocks[1], blocks[3], blocks[4])
    if settings.window:
        for layer in model.fast_attentions():
            layer.fast_scale.data.zero_()
    else:
        fit_layers(model, record_attention(base, torch.stack([block["input_ids"] for block in chosen])))
    for block in chosen:
        read = {name: block[name][None] for name in ("input_ids", "position_ids")}
        each.append(divergence(model(**read).logits, base(**read, use_cache=False).logits))
    return torch.stack(each).mean().item()


@torch.no_grad()
@pytest.mark.parametrize("wide", [0, 12])
def test_layers_are_given_back_one_after_another(base, blocks, wide):
    """Each is worth what it gives those that were given back before; and none is asked in vain."""
    settings, told = {"window": 4, "wide_window": wide, "layers": "0"}, []
    chosen, found = choose_layers(
        base, ConversionConfig(**settings | {"layers": "auto:2"}), blocks, lambda *at: told.append(at)
    )
    none = divergence_of(base, blocks, [], settings)
    first = [none - divergence_of(base, blocks, [i], settings) for i in range(3)]
    best = max(range(3), key=lambda i: first[i])
    others = [i for i in range(3) if i != best]
    second = {i: none - first[best] - divergence_of(base, blocks, [best, i], settings) for i in others}
    expected = [second.get(i, first[i]) for i in range(3)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-8)
    given = {best, max(others, key=lambda i: second[i])}
    assert [i in given for i in range(3)] == [
        window == 12 if wide else kind == "full_attention"
        for window, kind in zip(chosen.windows or (0, 0, 0), chosen.layer_types, strict=True)
    ]
    assert told == [(i, 5) for i in range(1, 6)]


@torch.no_grad()
def test_without_a_window_each_layer_is_converted_alone(base, blocks):
    _, found = choose_layers(base, ConversionConfig(layers="auto:1"), blocks)
    expected = [divergence_of(base, blocks, {0, 1, 2} - {i}, {}) for i in range(3)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-8)


@torch.no_grad()
def test_after_the_first_those_worth_most_are_asked_again(base, blocks, monkeypatch):
    monkeypatch.setattr("fastweights.training.layer_choice._ASKED_AGAIN", 1)
    once, _ = choose_layers(base, ConversionConfig(window=4, layers="auto:1"), blocks)
    _, before = choose_layers(base, ConversionConfig(window=4, layers="auto:1"), blocks)
    told = []
    twice, found = choose_layers(base, ConversionConfig(window=4, layers="auto:2"), blocks, lambda *at: told.append(at))
    assert told[-1] == (4, 4)
    converted = twice.layer_types.index("hybrid_sliding")
    assert found[converted] == pytest.approx(before[converted])  # not asked again
    assert found[converted] == min(before)
    assert once.layer_types.count("hybrid_sliding") == 2


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


def test_none_is_kept_where_none_is_asked_for(base, blocks):
    chosen, found = choose_layers(base, ConversionConfig(window=4, layers="auto:0"), blocks)
    assert chosen.layer_types == ["hybrid_sliding"] * 3
    assert found == [0.0] * 3


def test_a_model_without_a_head_is_refused(base, blocks):
    with pytest.raises(FastWeightsError, match="has no unembedding: give the causal language model"):
        choose_layers(base.base_model, ConversionConfig(layers="auto:1", window=4), blocks)


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
        ({"layers": "0,x"}, "layers is 0,x; allowed are numbers such as 0,4-9, auto:N, and none"),
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
        embeddings = model.model.base.rotary_emb(x, at), model.model.window_embeddings(x)
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
