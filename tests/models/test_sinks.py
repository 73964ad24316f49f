"""Sinks: with the fast weights off, a hybrid model is the original with a mask."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fastweights.errors import FastWeightsError
from fastweights.models import convert
from fastweights.models.cache import layer_tensors, state_bytes
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.replacement import inverse_rotation
from fastweights.reading.stream import Stream
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import make_gemma3, make_gpt2, make_llama, random_ids
from tests.models.checks import check_pieces_equal_one_pass
from tests.ops.problems import error

EXACT = 1e-12
WINDOW, SINKS = 8, 3


def window_alone(base, **changes):
    """A conversion that says what its window says."""
    model = convert(base.double(), ConversionConfig(window=WINDOW, sinks=SINKS, **changes)).eval()
    with torch.no_grad():
        for attention in model.fast_attentions():
            attention.fast_scale.zero_()
    return model


@torch.no_grad()
def test_short_texts_are_read_as_by_the_original(family):
    """Until the window is full and has lost its sinks, softmax over both is softmax over everything."""
    n = WINDOW + SINKS
    model, ids = window_alone(family), random_ids(2, 2 * n)
    truth = torch.cat([family(part).logits for part in ids.split(n, 1)], 1)
    assert error(model(ids[:, :n]).logits, truth[:, :n]) <= EXACT
    packed = model(ids, position_ids=torch.arange(n).repeat(1, 2)).logits
    assert error(packed, truth) <= EXACT
    later = {"position_ids": torch.tensor([[*range(7, 7 + n - 2), 40, 41]])}  # rotary embeddings are in float32
    assert error(model(ids[:, :n], **later).logits, family(ids[:, :n], **later).logits) <= tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 9, 10), (5, 30), tuple(range(1, 40))], ids=str)
def test_absolute_positions_read_as_the_original_with_a_mask(cuts):
    base, ids = make_gpt2(), random_ids(2, 40)
    model, i = window_alone(base), torch.arange(40)
    mask = (i <= i[:, None]) & ((i[:, None] - i < WINDOW) | (i < SINKS))
    truth = base(ids, attention_mask=torch.where(mask, 0.0, -torch.inf).double()[None, None]).logits
    cache = DynamicCache(config=model.config)
    found = torch.cat([model(part, cache=cache).logits for part in ids.tensor_split(cuts, 1)], 1)
    assert error(found, truth) <= EXACT


ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
BY_LENGTH = [
    ROPE | {"rope_type": "dynamic"},
    ROPE | {"rope_type": "longrope", "short_factor": [1 + i / 10 for i in range(8)], "long_factor": [*range(1, 9)]},
]


@pytest.mark.parametrize("rope", BY_LENGTH, ids=lambda rope: rope["rope_type"])
@torch.no_grad()
def test_rotary_frequencies_do_not_depend_on_the_length_of_the_text(rope, tmp_path):
    """Nor on whether the model was saved and loaded."""
    base = make_llama(hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    model, ids = convert(base, ConversionConfig(window=WINDOW, sinks=SINKS)).eval(), random_ids(1, 40)
    check_pieces_equal_one_pass(model, (9, 15, 17, 30))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    alone = window_alone(base)
    assert error(alone(ids[:, :WINDOW]).logits, base(ids[:, :WINDOW]).logits) <= tolerances.FLOAT32


@torch.no_grad()
def test_rotary_positions_of_sinks_end():
    """Once the window is full a token is no farther from the sinks, and what is not in sight counts for nothing."""
    base = make_llama(num_hidden_layers=1)
    model = window_alone(base)
    ids = random_ids(1, 65_536 + WINDOW)
    short = torch.cat((ids[:, :SINKS], ids[:, -WINDOW:]), 1)
    stream, part = Stream(model, 4096), None
    for part in ids.split(4096, 1):
        part = stream.read(part, logits_to_keep=1)
    # Rotary embeddings of the window's own positions are in float32.
    assert error(part, model(short, logits_to_keep=1).logits) <= 1e-2
    far, near = (
        model.model.window_embeddings(ids[:, :1], before=n)[WINDOW].sinks for n in (65_536, WINDOW + SINKS - 1)
    )
    assert all(torch.equal(*pair) for pair in zip(far, near, strict=True))
    at_its_place = base.model.rotary_emb(torch.empty(0).double(), torch.tensor([[WINDOW + SINKS - 1]]))
    assert all(torch.equal(*pair) for pair in zip(far, at_its_place, strict=True))


@torch.no_grad()
def test_keys_are_kept_once():
    """Whether or not fast weights are written them with the rotary embedding that the window's have."""
    ids, sizes = random_ids(1, 40), []
    for rotary in (True, False):
        model = convert(make_llama(), ConversionConfig(window=8, rotary=rotary)).eval()
        cache = model(ids, use_cache=True).cache
        sizes.append(state_bytes(cache))
        model(ids[:, :1], cache=cache)
        assert cache.decoding is not None
        sizes.append(sum(x.nbytes for layer in cache.layers for x in vars(layer.ring).values() if torch.is_tensor(x)))
    assert sizes[:2] == sizes[2:]


@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}])
def test_a_rotary_embedding_is_taken_off_again(rope):
    """With the factor of YaRN, too."""
    base = make_llama(rope_parameters={"rope_theta": 100.0, **rope})
    model = convert(base, ConversionConfig(window=4, rotary=False))
    x = torch.randn(2, 9, base.config.hidden_size, dtype=torch.float64)
    layer = model.double().fast_attentions()[0]
    q, k, _ = layer.project(x)
    at = model.model.base.rotary_emb(x, torch.arange(9)[None])
    rotated = layer.projections.rotate(q, k, at)
    assert not torch.allclose(rotated[1], k, rtol=1e-2, atol=1e-2)
    for there, back in zip((q, k), layer.projections.rotate(*rotated, inverse_rotation(*at)), strict=True):
        torch.testing.assert_close(back, there, rtol=1e-5, atol=1e-5)  # its squares are in float32


def test_positions_that_leave_some_out_are_refused_where_the_rotary_embedding_is_taken_off():
    ids, at = random_ids(2, 12), torch.arange(12)[None]
    leaves_out = torch.cat((at[:, :7], at[:, 7:] + 3), 1)
    model = convert(make_llama(), ConversionConfig(window=4, rotary=False)).eval()
    reason = "position_ids have 10 where the next in its document is 7"
    with pytest.raises(FastWeightsError, match=reason):
        model(ids, position_ids=leaves_out)
    with pytest.raises(FastWeightsError, match=reason):
        model(ids, position_ids=torch.cat((at, leaves_out)))
    cache = model(ids[:, :7], use_cache=True).cache
    with pytest.raises(FastWeightsError, match=reason):
        model(ids[:, 7:], position_ids=at[:, 7:] + 3, cache=cache)
    model(ids[:, 7:], position_ids=at[:, 7:], cache=cache)
    model(ids, position_ids=torch.cat((at[:, :7], at[:, :5]), 1))  # another document
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 4:6] = 0
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache = model(ids, position_ids=at + 100, use_cache=True).cache
    with pytest.raises(FastWeightsError, match="position_ids have 112 where the next in its document is 12"):
        model(ids, position_ids=at + 112, cache=cache)
    for others in (ConversionConfig(window=4), ConversionConfig(window=4, write="all", rotary=False)):
        convert(make_llama(), others).eval()(ids, position_ids=leaves_out)
    convert(make_gpt2(), ConversionConfig(window=4, rotary=False)).eval()(ids, position_ids=leaves_out)


@pytest.mark.parametrize("make", [make_llama, make_gemma3])
def test_angles_are_exact_far_into_a_text(make):
    """And before 65,536 they are what the base model makes, bit for bit."""
    base = make()
    rotary, theirs = convert(base, ConversionConfig(window=4)).model.base.rotary_emb, base.model.rotary_emb
    kinds = sorted(set(base.config.layer_types)) if make is make_gemma3 else [None]
    x, near, steps = torch.empty(0), torch.tensor([[0, 1, 77, 65_535]]), torch.tensor([[0, 1, 5]])
    for kind in kinds:
        told = () if kind is None else (kind,)
        assert all(torch.equal(*pair) for pair in zip(rotary(x, near, *told), theirs(x, near, *told), strict=True))
        beyond = torch.cat((near, torch.tensor([[70_000]])), 1)  # of which one is turned
        mixed = zip(rotary(x, beyond, *told), theirs(x, near, *told), strict=True)
        assert all(torch.equal(found[:, :-1], own) for found, own in mixed)
        frequencies = getattr(theirs, "inv_freq" if kind is None else f"{kind}_inv_freq").double()
        for far in (65_533, 65_536, 10_000_019, 65_536 * 300 - 2, 65_536 * 2**30 - 3):
            assert all(made.dtype == torch.bfloat16 for made in rotary(x.bfloat16(), far + steps, *told))
            cos, sin = rotary(x, far + steps, *told)
            # What a window sees is how far it has turned since a token in it.
            turned = (
                torch.complex(cos, sin)[0, :, : len(frequencies)] / torch.complex(cos, sin)[0, :1, : len(frequencies)]
            )
            angles = steps[0, :, None] * frequencies
            assert error(turned, torch.complex(angles.cos(), angles.sin())) <= 8e-3


def test_how_many():
    assert convert(make_gpt2(), ConversionConfig(window=4)).config.sinks == 4
    assert convert(make_gpt2(), ConversionConfig(window=4, sinks=0)).config.sinks == 0
    assert convert(make_gpt2()).config.sinks == 0
    for sinks, window, reason in ((-1, 4, "sinks is -1; allowed are 0"), (1, 0, "sinks is 1 and window is 0")):
        with pytest.raises(FastWeightsError, match=reason):
            ConversionConfig(window=window, sinks=sinks)


def test_models_from_before_there_were_sinks_have_none():
    config = convert(make_gpt2(), ConversionConfig(window=4)).config.to_dict()
    assert FastWeightsConfig(**config).sinks == 4
    del config["conversion"]["sinks"]
    assert FastWeightsConfig(**config).sinks == 0


def test_gradients_end_where_a_stream_is_cut():
    model = convert(make_gpt2(), ConversionConfig(window=4, sinks=2))
    stream = Stream(model, 20)
    stream.read(random_ids(1, 9))
    held = layer_tensors(stream.cache.layers[1])
    assert held["sink_keys"].requires_grad
    assert held["keys"].requires_grad
    stream.detach()
    assert not any(tensor.requires_grad for layer in stream.cache.layers for tensor in layer_tensors(layer).values())


@torch.no_grad()
def test_a_cache_with_other_sinks_is_refused():
    ids, cache = random_ids(1, 9), DynamicCache()
    convert(make_gpt2(), ConversionConfig(window=4, sinks=2))(ids, cache=cache)
    with pytest.raises(FastWeightsError, match="the cache is another model's"):
        convert(make_gpt2(), ConversionConfig(window=4, sinks=1))(ids, cache=cache)
