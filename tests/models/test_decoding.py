"""Steps of decoding by few large operations: they give what transformers' modules give, and leave what they leave."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from itertools import product

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastweights.errors import FastWeightsError
from fastweights.layers.eight_bits import BLOCK
from fastweights.layers.feature_maps import SoftmaxOfProjection
from fastweights.layers.mix_gate import MixGate
from fastweights.layers.quantised import Int4Linear, Int8Linear
from fastweights.models import add_fast_weight_layer, convert, decoding, rings
from fastweights.models.cache import (
    FastWeightsCache,
    HybridCacheLayer,
    PureCacheLayer,
    SlidingCacheLayer,
    layer_tensors,
    state_bytes,
)
from fastweights.models.decoding import Decoder, set_fast_decoding, why_plain
from fastweights.models.lora import add_lora
from fastweights.models.quantisation import WeightsConfig, quantise
from fastweights.models.rings import GrowingCacheLayer
from fastweights.ops import few_bits
from fastweights.ops.numba.runtime import load_kernels
from fastweights.reading.memory import load_memory, new_memory
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from tests import tolerances
from tests.conftest import FAMILIES, make_gpt2, make_llama, random_ids
from tests.ops.problems import error, threads_of_torch

LIKE_LLAMA = ("gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
ALL = (*LIKE_LLAMA, "gpt2", "gpt_neox", "opt", "phi3")
FORMS = {
    "pure": {},
    "pure, no rotary": {"rotary": False},
    "window": {"window": 8},
    "window, no rotary": {"window": 8, "rotary": False},
    "window of 2": {"window": 2, "rotary": False},
    "no sinks": {"window": 8, "sinks": 0},
    "writes all": {"window": 8, "write": "all"},
    "several windows": {"window": 4, "wide_window": 16, "layers": "0,2"},
}


def make(family: str = "llama", rule: str = "decay", changes: dict | None = None, **settings):
    """A model whose gates and factors say something."""
    if "wide_window" in settings:
        settings = {**settings, "windows": [4, 16, 4]}
        del settings["layers"], settings["wide_window"]
    model = convert(FAMILIES[family](**(changes or {})), ConversionConfig(rule=rule, **settings)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name in model.new_parameter_names():
            parameter = model.get_parameter(name)
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_layer(model, **settings):
    """And a Fast Weight Layer whose steps change what it says."""
    model = add_fast_weight_layer(model, FastWeightLayerSettings(**{"decay": "scalar", **settings}))
    with torch.no_grad():
        model.fast_weight_layer.output_scale.normal_()
        if model.fast_weight_layer.settings.updates:
            model.fast_weight_layer.log_step_size += 3.0
    return model.eval()


def with_another_map(model):
    class Twice(SoftmaxOfProjection):
        def forward(self, x):
            return super().forward(2 * x)

    rule = model.fast_attentions()[0].rule
    rule.query_map = Twice(model.config.head_dim, rule.shape.heads)
    return model


@pytest.fixture(autouse=True)
def _on():
    yield
    set_fast_decoding(True)


@torch.no_grad()
def check(
    model, rows: int = 1, start: int = 5, tolerance: float = 2 * tolerances.FLOAT32, plain_step: int = 12
) -> FastWeightsCache:
    """Twelve tokens, one by one by the kernel and so many at a time without it, and then five at once."""
    ids, caches = random_ids(rows, 40), []
    for fast in (False, True):
        set_fast_decoding(fast)
        cache = FastWeightsCache(model.config)
        logits = [model(ids[:, :start], cache=cache).logits[:, -1:]]
        steps = ids[:, start : start + 12].split(1 if fast else plain_step, 1)
        logits += [model(step, cache=cache).logits for step in steps]
        assert (cache.decoding is not None) == fast
        assert cache.get_seq_length() == start + 12
        then = model(ids[:, -5:], cache=cache).logits
        caches.append((torch.cat(logits, 1), then, cache))
    (plain, plain_then, _), (fast, fast_then, cache) = caches
    assert error(fast, plain) <= tolerance
    assert error(fast_then, plain_then) <= tolerance
    return cache


@pytest.mark.parametrize(
    ("rule", "form"),
    [
        *product(("decay", "gated_delta", "delta_and_average"), FORMS),
        *product(("add", "gated", "average", "delta"), ("pure", "window", "several windows")),
    ],
)
def test_rules_and_windows(rule, form):
    for start in (1, 20):
        check(make(rule=rule, **FORMS[form]), start=start)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rule", "value_map"), [("average", False), ("gated_delta", True), ("delta_and_average", True)]
)
def test_queries_keys_and_values_of_their_own(rule, form, value_map):
    model = make(rule=rule, feature_map="linear", value_map=value_map, **FORMS[form])
    assert why_plain(model) is None
    for start in (1, 20):
        check(model, start=start)
    check(model, rows=3)


NEAR_HALVES = 2e-2
"""What it may make where numbers that differ in their last digit are rounded to different codes."""


def in_both_ways(model, rows: int, start: int) -> tuple[FastWeightsCache, FastWeightsCache]:
    """What is kept after the same tokens, one by one by the kernel and without it, which say nearly the same."""
    cache, ids = check(model, rows=rows, start=start, tolerance=NEAR_HALVES, plain_step=1), random_ids(rows, 40)
    set_fast_decoding(False)
    plain = FastWeightsCache(model.config)
    for part in (ids[:, :start], *ids[:, start : start + 12].split(1, 1), ids[:, -5:]):
        model(part, cache=plain)
    return cache, plain


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("form", [form for form in FORMS if "pure" not in form])
@pytest.mark.parametrize("rule", ["decay", "delta_and_average"])
def test_windows_in_eight_bits(rule, form, family, rows):
    """Whose codes are those that the plain steps keep, in the first layer but where a number is between two."""
    # Heads of 40 and 33 channels: a whole block and a part of one.
    changes = {"head_dim": 40} if family == "llama" else {"n_embd": 66}
    model = make(family, rule=rule, window_dtype="int8", changes=changes, **FORMS[form])
    assert why_plain(model) is None
    for start in (1, 20):
        cache, plain = in_both_ways(model, rows, start)
        held, expected = cache.layers[0].kept(), plain.layers[0].kept()
        codes, exponents = ([f"{name}_{part}" for name in ("keys", "values")] for part in ("codes", "exponents"))
        assert held.keys() == expected.keys() == {*codes, *exponents}
        off = torch.cat([(held[name].int() - expected[name].int()).abs().flatten() for name in codes])
        assert (off > 0).float().mean() <= 0.02
        assert off.max() <= 1
        assert all(torch.equal(held[name], expected[name]) for name in exponents)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["pure", "window, no rotary", "writes all", "several windows"])
@pytest.mark.parametrize("rule", ["decay", "gated_delta", "delta_and_average"])
def test_states_in_eight_bits(rule, form, family, rows):
    """Whose codes are those that the plain steps keep, in the first layer but where a number is between two."""
    changes = {"head_dim": 40} if family == "llama" else {"n_embd": 66}
    model = make(family, rule=rule, state_dtype="int8", changes=changes, **FORMS[form])
    assert why_plain(model) is None
    for start in (1, 20):
        cache, plain = in_both_ways(model, rows, start)
        held, expected = layer_tensors(cache.layers[0]), layer_tensors(plain.layers[0])
        assert held.keys() == expected.keys()
        assert {"state0_codes", "state0_exponents"} <= held.keys()
        off = (held["state0_codes"].int() - expected["state0_codes"].int()).abs()
        same = held["state0_exponents"] == expected["state0_exponents"]
        assert same.float().mean() >= 0.98
        same = same.repeat_interleave(BLOCK, -1)[..., : off.shape[-1]]
        assert (off[same] > 0).float().mean() <= 0.02
        assert (off[same] > 2).float().mean() <= 0.002


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"layers": "none"}),
        ("llama", {"layers": "1", "window": 8, "window_dtype": "int8"}),
        ("gpt2", {"layers": "0,2"}),
        ("gemma3_text", {"layers": "none"}),
        ("mistral", {"layers": "none"}),
    ],
)
def test_softmax_layers_in_eight_bits(family, settings, rows, monkeypatch):
    """Also where their room is copied to a larger one."""
    monkeypatch.setattr(rings, "_MORE_TOKENS", 4)
    changes = {"n_embd": 66} if family == "gpt2" else {"head_dim": 40}
    model = convert(FAMILIES[family](**changes), ConversionConfig(softmax_dtype="int8", **settings)).eval()
    assert why_plain(model) is None
    for start in (1, 20):
        cache, plain = in_both_ways(model, rows, start)
        assert state_bytes(cache) == state_bytes(plain)
        for layer, other in zip(cache.layers, plain.layers, strict=True):
            held, expected = layer_tensors(layer), layer_tensors(other)
            assert held.keys() == expected.keys()
            if isinstance(layer, GrowingCacheLayer | SlidingCacheLayer):
                assert held["keys_codes"].shape == expected["keys_codes"].shape
                off = (held["keys_codes"].int() - expected["keys_codes"].int()).abs()
                assert (off > 0).float().mean() <= 0.02
                assert off.max() <= 1
        twice = copy.deepcopy(cache)
        found = [model(random_ids(rows, 1), cache=each).logits for each in (cache, twice, plain)]
        assert torch.equal(found[0], found[1])
        assert error(found[0], found[2]) <= NEAR_HALVES


@torch.no_grad()
def test_what_is_not_finite_is_not_rounded_away():
    model = make(window=8, window_dtype="int8", rotary=False)
    cache = FastWeightsCache(model.config)
    model(random_ids(1, 9), cache=cache)
    assert model(random_ids(1, 1), cache=cache).logits.isfinite().all()
    cache.layers[0].ring.v_exponents[..., 3] = -128
    assert cache.decoding is not None
    assert model(random_ids(1, 1), cache=cache).logits.isnan().any()
    model = make(state_dtype="int8")
    cache = FastWeightsCache(model.config)
    model(random_ids(1, 9), cache=cache)
    assert model(random_ids(1, 1), cache=cache).logits.isfinite().all()
    cache.layers[0].exponents[..., 3, 0] = -128
    for _ in range(2):
        assert model(random_ids(1, 1), cache=cache).logits.isnan().any()
    assert cache.decoding is not None
    assert (cache.layers[0].exponents == -128).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["decay", "delta_and_average"])
def test_a_gate_on_the_mix(rule, form):
    model = make(rule=rule, mix_gate=True, **FORMS[form])
    assert why_plain(model) is None
    for start in (1, 20):
        check(model, start=start)
    check(model, rows=3)


def test_other_gates_on_the_mix_take_plain_steps():
    class Twice(MixGate):
        def forward(self, x):
            return super().forward(2 * x)

    model = make(window=8, mix_gate=True)
    layer = model.fast_attentions()[0]
    gate, shape = layer.mix_gate.gate, (model.config.hidden_size, layer.heads)
    layer.mix_gate = Twice(*shape, window=True)
    assert "its gate on the mix is Twice" in why_plain(model)
    layer.mix_gate = MixGate(*shape, window=True)
    assert why_plain(model) is None
    layer.mix_gate.gate = torch.nn.Sequential(gate)
    assert "layers of the kind Sequential" in why_plain(model)


@pytest.mark.parametrize(
    ("family", "size", "form"),
    [
        *(("llama", 4, form) for form in FORMS if form != "pure, no rotary"),
        ("qwen3", 2, "pure"),
        ("olmo2", 4, "window"),
        ("gpt2", 7, "writes all"),
        ("gpt2", 4, "pure"),
        ("phi3", 4, "window, no rotary"),
    ],
)
def test_short_convolutions(family, size, form):
    model = make(family, rule="gated_delta", conv_size=size, **FORMS[form])
    assert why_plain(model) is None
    check(model, start=1)
    check(model, rows=3, start=20)


@pytest.mark.parametrize("family", LIKE_LLAMA)
@pytest.mark.parametrize("form", ["pure", "window, no rotary"])
def test_families(family, form):
    model = make(family, **FORMS[form])
    assert why_plain(model) is None
    check(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "converted", "window"),
    [
        *((family, *kept) for family in ALL for kept in (("0,2", 8), ("none", 0))),
        *((family, *kept) for family in ("llama", "gpt2", "gemma3_text") for kept in (("0,2", 0), ("2", 8))),
    ],
)
def test_layers_that_keep_their_attention(family, converted, window, monkeypatch):
    """One of Gemma's has a window of its own, shorter than the texts."""
    monkeypatch.setattr(rings, "_MORE_TOKENS", 5)  # so that it is too small twice
    model = make(family, window=window, layers=converted)
    assert why_plain(model) is None
    for rows, start in ((1, 1), (1, 20), (3, 20)):
        cache, ids = check(model, rows=rows, start=start), random_ids(rows, 40)
        whole = model(torch.cat((ids[:, : start + 12], ids[:, -5:]), 1), use_cache=True).cache
        for layer, expected in zip(cache.layers, whole.layers, strict=True):
            if not isinstance(expected, PureCacheLayer | HybridCacheLayer):
                assert error(layer.keys, expected.keys) <= 2 * tolerances.FLOAT32
                assert error(layer.values, expected.values) <= 2 * tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_changed_in_a_layer_that_keeps_its_attention_is_seen(family):
    model, ids = make(family, window=8, layers="0,2"), random_ids(1, 40)
    for change in ("keys", "values"):
        found = []
        for fast in (False, True):
            set_fast_decoding(fast)
            cache = FastWeightsCache(model.config)
            model(ids[:, :9], cache=cache)
            model(ids[:, 9:10], cache=cache)
            setattr(cache.layers[1], change, getattr(cache.layers[1], change) * 0.1)
            found.append(model(ids[:, 10:11], cache=cache).logits)
        assert error(found[1], found[0]) <= 2 * tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_beam_goes_plainly_where_layers_keep_their_attention(family):
    model, ids = make(family, window=8, layers="0,2"), random_ids(2, 40)
    cache = FastWeightsCache(model.config)
    model(ids[:, :9], cache=cache)
    model(ids[:, 9:10], cache=cache)
    assert cache.decoding is not None
    cache.reorder_cache(torch.tensor([1, 0]))
    model(ids[:, 10:11], cache=cache)
    assert cache.decoding is None
    cache.reset()
    model(ids[:, :9], cache=cache)
    model(ids[:, 9:10], cache=cache)
    assert cache.decoding is not None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_attention_that_is_more_than_a_softmax_goes_plainly(family):
    """Dropout that is on, by a number, and another function in its place: at first, and in the middle of a text."""

    def halved(module, q, k, v, mask, **others):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q / 2, k, v, mask, **others)

    AttentionInterface.register("halved", halved)
    model = make(family, changes={"attention_dropout": 0.9}, window=8, layers="0,2")
    kept = model.model.base.layers[1].get_submodule(model.model.architecture.attention)
    ids, cache = random_ids(1, 40), FastWeightsCache(model.config)
    model(ids[:, :9], cache=cache)
    model(ids[:, 9:10], cache=cache)
    assert cache.decoding is not None
    kept.train()
    assert why_plain(model) == "it drops out"
    model(ids[:, 10:11], cache=cache)
    assert cache.decoding is None
    kept.eval()
    model(ids[:, 11:12], cache=cache)
    assert cache.decoding is not None
    model.set_attn_implementation("halved")
    assert why_plain(model) == "its softmax attention is halved"
    model(ids[:, 12:13], cache=cache)
    assert cache.decoding is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_layer_that_keeps_its_attention_goes_on_anywhere(family, monkeypatch):
    """Rows in another order, a copy, other tokens read plainly, an emptied cache: steps go on from what is there."""
    monkeypatch.setattr(rings, "_MORE_TOKENS", 5)
    model, ids = make(family, window=8, layers="0,2"), random_ids(2, 40)

    def read(*, fast: bool) -> list[torch.Tensor]:
        set_fast_decoding(fast)
        found, cache = [], FastWeightsCache(model.config)

        def step(at: int, to: int) -> None:
            found.append(model(ids[:, at:to], cache=cache).logits[:, -1])

        step(0, 9)
        for at in range(9, 13):
            step(at, at + 1)
        cache.reorder_cache(torch.tensor([1, 0]))
        step(13, 14)
        other = copy.deepcopy(cache)
        step(14, 15)
        step(15, 19)
        step(19, 20)
        found.append(model(ids[:, 14:15], cache=other).logits[:, -1])
        assert (cache.get_seq_length(), other.get_seq_length()) == (20, 15)
        cache.reset()
        step(0, 3)
        step(3, 4)
        return found

    for plain, fast in zip(read(fast=False), read(fast=True), strict=True):
        assert error(fast, plain) <= 2 * tolerances.FLOAT32


@torch.no_grad()
def test_the_windows_of_layers_that_keep_them():
    """In a cache of transformers' and in ours they hold no more than they need, whatever is read at once."""
    model, ids = make("gemma3_text", window=8, layers="0,2"), random_ids(1, 40)
    sizes = set()
    for cache in (DynamicCache(config=model.config.base), DynamicCache(), FastWeightsCache(model.config)):
        for at, to in ((0, 3), (3, 30), (30, 35)):
            model(ids[:, at:to], cache=cache)
            assert type(cache.layers[1]) is SlidingCacheLayer
            assert cache.layers[1].get_seq_length() == to
        sizes.add(state_bytes(cache))
    assert sizes == {state_bytes(model(ids, use_cache=True).cache)}
    model(ids[:, 35:36], cache=cache)
    assert cache.decoding is not None
    kept = cache.layers[1]
    assert kept.ring is not None
    kept.activate_past_recording()  # transformers' way back, for which more than the window is kept
    for i in range(36, 39):
        model(ids[:, i : i + 1], cache=cache)
    assert cache.decoding is None
    assert kept.keys.shape[2] == 7


def test_a_softmax_layers_own_window_of_one_token():
    check(make("gemma3_text", changes={"sliding_window": 1}, window=8), start=7)


@torch.no_grad()
def test_positions_of_softmax_over_all_tokens_begin_nowhere_else():
    model = make(layers="0,2")
    cache = FastWeightsCache(model.config)
    model(random_ids(1, 9), cache=cache)
    with pytest.raises(FastWeightsError, match="cannot begin anew"):
        cache.begin_here()


@pytest.mark.parametrize(
    ("form", "rows"),
    [*product(("pure", "window", "no sinks", "writes all", "several windows"), (1,)), ("several windows", 3)],
)
@pytest.mark.parametrize(
    ("family", "positions"), [("gpt2", "keep"), ("gpt2", "drop"), ("opt", "keep"), ("opt", "drop")]
)
def test_absolute_positions(family, positions, form, rows):
    """With positions in the residual stream, or biases in the window."""
    for start in (1, 20):
        check(make(family, positions=positions, **FORMS[form]), rows, start)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("form", ["pure", "window", "window, no rotary"])
def test_phi3(form, rows):
    check(make("phi3", **FORMS[form]), rows)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("form", ["pure", "window", "window, no rotary"])
@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox(form, rows, parallel):
    check(make("gpt_neox", changes={"use_parallel_residual": parallel}, **FORMS[form]), rows)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@torch.no_grad()
def test_activations(activation):
    check(make("gpt2", changes={"activation_function": activation}, positions="drop"))
    x = torch.linspace(-12, 12, 4001)[None]
    out, kernels = torch.empty_like(x), load_kernels("decoding")
    unit = {"gelu": kernels.exact_gelu_unit, "relu": kernels.relu_unit}.get(activation, kernels.gelu_unit)
    unit(x.numpy(), out.numpy())
    assert error(out, ACT2FN[activation](x.double())) <= tolerances.FLOAT32 / 10
    x[0, ::7] = torch.nan
    unit(x.numpy(), out.numpy())
    assert out.isnan().equal(x.isnan())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("settings", [{"segment": 4}, {"segment": 0, "decay": "channel"}, {"updates": False}])
def test_a_fast_weight_layer_goes_on_learning(family, rows, kept, settings):
    """On fast weights, with a window or without, and on a model that keeps its softmax attention."""
    window = {"window": 8} if rows == 1 else {}
    model = with_layer(FAMILIES[family]() if kept else make(family, positions="drop", **window), **settings)
    cache = check(model, rows, tolerance=3 * tolerances.FLOAT32)  # each update goes on from rounded ones
    assert cache.block is not None
    learned = settings.get("updates", True)
    assert (cache.block.kept() is not None) == learned
    if learned:
        assert all(x.abs().max() > 0 for x in cache.block.kept()[0].now)


def test_a_fast_weight_layer_generates_and_is_copied():
    model, ids = with_layer(make(window=8), segment=4), random_ids(2, 9)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for fast in (True, False):
        set_fast_decoding(fast)
        cache = FastWeightsCache(model.config)
        with torch.no_grad():
            model(ids[:, :8], cache=cache)
            model(ids[:, 8:], cache=cache)
            twin = copy.deepcopy(cache)
            found.append([model(ids[:, :1], cache=x).logits for x in (cache, twin, twin)])
        found[-1] += [model.generate(ids, num_beams=beams, **settings) for beams in (1, 3)]
    for fast, plain in zip(*found, strict=True):
        assert error(fast, plain) <= 2 * tolerances.FLOAT32
    assert found[0][0].equal(found[0][1])
    assert not found[0][1].equal(found[0][2])


@torch.no_grad()
def test_absolute_positions_end():
    model = make("gpt2", window=8)
    limit = model.max_positions
    ids, cache = random_ids(1, limit + 1), FastWeightsCache(model.config)
    model(ids[:, : limit - 2], cache=cache)
    for i in (limit - 2, limit - 1):
        model(ids[:, i : i + 1], cache=cache)
    assert cache.decoding is not None
    with pytest.raises(FastWeightsError, match=f"absolute positions end at {limit}"):
        model(ids[:, limit:], cache=cache)


@pytest.mark.parametrize("rows", [2, 3, 20])
def test_rows(rows):
    check(make(window=8), rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"gate_rank": 4},
        {"value_gate": False},
        {"gate_rank": 4, "window": 8},
        {"rule": "gated_delta", "gate_rank": 4},
        {"rule": "delta_and_average", "gate_rank": 4},
        {"rule": "delta_and_average", "conv_size": 4, "feature_map": "linear"},
        {"rule": "delta_and_average", "layers": "0,2"},
        {"rule": "delta_and_average", "feature_dim": 3},
        {"rule": "delta_and_average", "feature_dim": 20, "window": 8},
    ],
)
def test_gates(settings):
    check(make(**settings))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(
    ("family", "rows"),
    [
        *product(("llama", "gpt2", "phi3", "gpt_neox", "gemma3_text", "olmo2", "opt"), (1,)),
        *product(("llama", "gpt2"), (2, 20)),
    ],
)
def test_quantised(family, weights, rows):
    check(quantise(make(family, window=8, rotary=False), weights), rows, tolerance=8 * tolerances.BFLOAT16)


@torch.no_grad()
def test_quantised_weights_are_joined_and_still_saved(tmp_path):
    model = quantise(make_wide(), "int4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check(model, tolerance=8 * tolerances.BFLOAT16)
    attention, unit = model.fast_attentions()[0], model.model.base.layers[0].mlp
    assert are_joined(attention.q_proj, attention.k_proj, attention.v_proj)
    assert type(unit.gate_proj) is Int4Linear
    block = unit.gate_proj._block
    assert are_joined(unit.gate_proj, unit.up_proj) == (block > 0 and unit.gate_proj.out_features % block == 0)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]), name
    model.save_pretrained(tmp_path)
    copied = copy.deepcopy(model)
    check(copied, tolerance=8 * tolerances.BFLOAT16)
    assert copied.__dict__["_decoder"] is not model.__dict__["_decoder"]


def are_joined(*layers):
    return len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1


def make_wide():
    return convert(
        make_llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1), ConversionConfig(window=8)
    ).eval()


@torch.no_grad()
def test_generate_by_sampling_beams_and_with_padding():
    model, ids = make(window=8), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for arguments in (
        {"attention_mask": torch.ones_like(ids)},
        {"attention_mask": mask},
        {"attention_mask": torch.ones_like(ids), "num_beams": 3},
        {"attention_mask": torch.ones_like(ids), "cache": DynamicCache()},
    ):
        told = []
        for fast in (False, True):
            set_fast_decoding(fast)
            arguments = {key: DynamicCache() if key == "cache" else value for key, value in arguments.items()}
            told.append(model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=256, **arguments))
        assert told[0].equal(told[1])


@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_by_itself():
    model, ids = make(window=8), random_ids(1, 40)
    cache = FastWeightsCache(model.config)
    model(ids[:, :20], cache=cache)
    model(ids[:, 20:21], cache=cache)
    copied = copy.deepcopy(cache)
    expected = model(ids[:, 21:22], cache=cache).logits
    model(ids[:, 30:31], cache=cache)  # of which the copy must know nothing
    assert model(ids[:, 21:22], cache=copied).logits.equal(expected)
    assert copied.decoding is not cache.decoding


@torch.no_grad()
@pytest.mark.parametrize("form", ["pure", "window"])
def test_a_cache_that_is_emptied_begins_anew(form):
    model, ids = make(**FORMS[form]), random_ids(1, 40)
    cache, logits = FastWeightsCache(model.config), []
    for _ in range(2):
        logits.append(torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(20)], 1))
        cache.reset()
    assert logits[0].equal(logits[1])


@torch.no_grad()
def test_the_state_keeps_its_size_and_is_saved(tmp_path):
    model, ids = make(window=8), random_ids(1, 40)
    memory = new_memory(model).read([ids[0, :20]])
    told = memory.generate(max_new_tokens=6, do_sample=False, eos_token_id=None)
    sizes = []
    cache = FastWeightsCache(model.config)
    model(ids[:, :20], cache=cache)
    for i in range(20, 36):
        model(ids[:, i : i + 1], cache=cache)
        sizes.append(state_bytes(cache))
    assert len(set(sizes)) == 1
    memory.save(tmp_path / "x")
    assert load_memory(model, tmp_path / "x").generate(max_new_tokens=6, do_sample=False, eos_token_id=None).equal(told)


@torch.no_grad()
def test_weights_that_change_are_seen():
    """In place while a text goes on, and by others in their place when the next begins."""
    model = make(window=8)
    check(model)
    model.fast_attentions()[0].fast_scale.mul_(2.0)
    check(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.01
    check(model)
    quantise(model, "bf16")
    check(model, tolerance=8 * tolerances.BFLOAT16)


@torch.no_grad()
def test_what_is_no_case_for_it():
    ids = random_ids(1, 12)

    def plain(model, **arguments) -> bool:
        cache = FastWeightsCache(model.config)
        model(ids[:, :8], cache=cache)
        model(ids[:, 8:9], cache=cache, **arguments)
        return cache.decoding is None or not cache.decoding.is_current(cache, 1)

    assert not plain(make())
    assert plain(make(), output_hidden_states=True)
    assert plain(make(), position_ids=torch.tensor([[9]]))
    assert not plain(make(), position_ids=torch.tensor([[8]]))
    with torch.enable_grad():
        assert plain(make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(make())
    hooked, seen = make(), []
    hooked.model.base.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert plain(hooked)
    assert len(seen) == 2
    dropping = make("gpt2")
    dropout(dropping)
    other = make(layers="0,2")
    kept = other.model.base.layers[1].self_attn
    kept.__class__ = type("OtherAttention", (type(kept),), {})
    others = {name: make() for name in ("activation", "unit", "layer")}
    others["activation"].model.base.layers[2].mlp.act_fn = nn.ReLU()
    for name, module in (("unit", "layers.1.mlp"), ("layer", "layers.1")):
        mine = others[name].model.base.get_submodule(module)
        mine.__class__ = type("Mine", (type(mine),), {"__module__": __name__})
    for model, reason in (
        (others["activation"], "its activation is ReLU"),
        (others["unit"], "it has a Mine, which is not its family's"),
        (others["layer"], "it has a Mine, which is not its family's"),
        (make("opt", changes={"do_layer_norm_before": False}), "do_layer_norm_before is False"),
        (make("opt", changes={"word_embed_proj_dim": 16}), "embedding is of another width"),
        (make("llama", "gated", feature_map="elu+1"), "rule is GatedRule, or has a normaliser"),
        (with_another_map(make("llama", "delta_and_average")), "DeltaAndAverageRule, or has a normaliser or parts"),
        (make("llama", feature_map="elu+1"), "feature map"),
        (make("llama").bfloat16(), "float32"),
        (convert(make_gpt2(activation_function="silu", hidden_act="gelu_new"), ConversionConfig()).eval(), "is silu"),
        (dropping, "drops out"),
        (other, "layer 1 has an attention of the kind OtherAttention"),
        (with_layer(FAMILIES["gemma3_text"](use_bidirectional_attention=True)), "layer 0 sees tokens to come"),
    ):
        assert reason in why_plain(model)
        assert plain(model)


@torch.no_grad()
def test_two_threads_with_one_model():
    model, ids = make(window=8), random_ids(2, 60)
    alone = []
    for row in range(2):
        cache = FastWeightsCache(model.config)
        model(ids[row : row + 1, :8], cache=cache)
        alone.append([model(ids[row : row + 1, i : i + 1], cache=cache).logits for i in range(8, 60)])
    found: list[list] = [[], []]

    @torch.no_grad()
    def go(row: int) -> None:
        cache = FastWeightsCache(model.config)
        model(ids[row : row + 1, :8], cache=cache)
        found[row] += [model(ids[row : row + 1, i : i + 1], cache=cache).logits for i in range(8, 60)]

    threads = [threading.Thread(target=go, args=(row,)) for row in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for row in range(2):
        assert error(torch.cat(found[row], 1), torch.cat(alone[row], 1)) <= 2 * tolerances.FLOAT32


@torch.no_grad()
def steps(monkeypatch, do) -> int:
    """How often a decoder made a step while `do` was done."""
    made, step = [], Decoder.step

    def counted(self, *arguments):
        made.append(1)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", counted)
        do()
    return len(made)


def test_memories_generate_by_these_steps(monkeypatch):
    model, ids = make(window=8), random_ids(1, 20)
    memory = new_memory(model).read([ids[0]])
    told, arguments = [], {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    for fast in (False, True):
        set_fast_decoding(fast)
        made = steps(monkeypatch, lambda: told.append(memory.fork().generate(**arguments)))
        assert made == (10 if fast else 0)
    assert told[0].equal(told[1])


@torch.no_grad()
def test_positions_count_from_where_a_cache_is_said_to_begin():
    model, ids, logits = make(window=8), random_ids(1, 20), []
    for fast in (False, True):
        set_fast_decoding(fast)
        for position in (0, 10):
            cache = FastWeightsCache(model.config)
            model(ids[:, :10], cache=cache)
            cache.begin_here()
            logits.append(model(ids[:, 10:11], cache=cache, position_ids=torch.tensor([[position]])).logits)
    assert error(logits[2], logits[0]) <= 2 * tolerances.FLOAT32
    assert error(logits[3], logits[1]) <= 2 * tolerances.FLOAT32


@torch.no_grad()
def test_lora_and_what_else_changes_the_layers():
    model = make(window=8)
    check(model)
    add_lora(model, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    assert "layers of the kind Linear" in why_plain(model)
    ids, logits = random_ids(1, 20), []
    for fast in (False, True):
        set_fast_decoding(fast)
        cache = FastWeightsCache(model.config)
        model(ids[:, :10], cache=cache)
        logits.append(model(ids[:, 10:11], cache=cache).logits)
    assert logits[0].equal(logits[1])


def hook(model):
    model.model.base.layers[1].mlp.register_forward_hook(lambda *_: None)


def own_forward(model):
    mlp = model.model.base.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def other_numbers(model):
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


def dropout(model):
    model.model.base.h[1].mlp.dropout.p = 1.0
    model.model.base.h[1].mlp.dropout.train()


def scaled_norm(model):
    model.model.base.norm.weight = torch.nn.Parameter(2 * model.model.base.norm.weight)


CHANGES = {
    "hook": hook,
    "forward": own_forward,
    "data": other_numbers,
    "norm": scaled_norm,
    "bits": lambda m: quantise(m, "int8"),
}


@torch.no_grad()
def test_dropout_that_is_switched_on_by_itself_is_noticed():
    ids, logits = random_ids(1, 20), []
    for fast in (False, True):
        set_fast_decoding(fast)
        model = make("gpt2", window=8)
        cache = FastWeightsCache(model.config)
        model(ids[:, :10], cache=cache)
        model(ids[:, 10:11], cache=cache)
        dropout(model)
        logits.append(model(ids[:, 11:12], cache=cache).logits)
    assert error(logits[1], logits[0]) <= 2 * tolerances.FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_in_the_middle_of_a_text_is_noticed(what):
    ids, logits = random_ids(1, 20), []
    for fast in (False, True):
        set_fast_decoding(fast)
        model = make(window=8)
        cache = FastWeightsCache(model.config)
        model(ids[:, :10], cache=cache)
        model(ids[:, 10:11], cache=cache)
        CHANGES[what](model)
        logits.append(model(ids[:, 11:12], cache=cache).logits)
    assert error(logits[1], logits[0]) <= (8 * tolerances.BFLOAT16 if what == "bits" else 2 * tolerances.FLOAT32)


@torch.no_grad()
def test_another_model_goes_on_with_its_own_weights():
    model, other, ids, logits = make(window=8), make(window=8), random_ids(1, 20), []
    other_numbers(other)
    for fast in (False, True):
        set_fast_decoding(fast)
        cache = FastWeightsCache(model.config)
        model(ids[:, :10], cache=cache)
        model(ids[:, 10:11], cache=cache)
        logits.append(other(ids[:, 11:12], cache=cache).logits)
    assert error(logits[1], logits[0]) <= 2 * tolerances.FLOAT32


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int4"])
def test_inference_mode_leaves_nothing_behind(weights):
    model, ids = quantise(make(window=8), weights), random_ids(1, 20)
    with torch.inference_mode():
        cache = FastWeightsCache(model.config)
        for i in range(6):
            model(ids[:, i : i + 1], cache=cache)
        assert cache.decoding is not None
    check(model, tolerance=8 * tolerances.BFLOAT16)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("left_out", ["k_proj", "up_proj", "o_proj"])
def test_layers_of_several_kinds(tmp_path, left_out):
    make(window=8).save_pretrained(tmp_path)
    config = WeightsConfig("int8", modules_to_not_convert=[left_out])
    check(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config), tolerance=8 * tolerances.BFLOAT16)


@torch.no_grad()
@pytest.mark.parametrize("eight", [[], ["q_proj", "o_proj"], ["v_proj"], ["up_proj"], ["mlp"]])
@pytest.mark.parametrize("rows", [1, 2])
def test_four_bits_beside_eight(tmp_path, eight, rows):
    make_wide().save_pretrained(tmp_path)
    config = WeightsConfig("int4", modules_in_int8=eight)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    layer = model.model.base.layers[0]
    assert (type(layer.self_attn.q_proj) is Int8Linear) == ("q_proj" in eight)
    assert type(layer.self_attn.k_proj) is Int4Linear
    # Many tokens at once would go another way, which rounds their numbers.
    check(model, rows, tolerance=8 * tolerances.BFLOAT16, plain_step=1)


@torch.no_grad()
def test_a_pickled_cache_goes_on():
    model, ids, logits = make(window=4), random_ids(1, 24), []
    for fast in (False, True):
        set_fast_decoding(fast)
        cache = FastWeightsCache(model.config)
        for i in range(10):
            model(ids[:, i : i + 1], cache=cache)
            if i == 1:
                cache = pickle.loads(pickle.dumps(cache))
        logits.append(model(ids[:, 10:14], cache=cache).logits)
    assert error(logits[1], logits[0]) <= 2 * tolerances.FLOAT32


@torch.no_grad()
def test_joined_once_whatever_the_number_of_rows():
    model, places = quantise(make(window=8), "int8"), set()
    for rows in (1, 2, 1, 3):
        check(model, rows, tolerance=8 * tolerances.BFLOAT16)
        places.add(model.fast_attentions()[0].q_proj.weight.untyped_storage().data_ptr())
    assert len(places) == 1


def test_old_layers_are_given_back():
    model = make(window=8)
    check(model)
    old = weakref.ref(model.model.base.layers[0].mlp.gate_proj)
    quantise(model, "int8")
    gc.collect()
    assert old() is None


@torch.no_grad()
def test_another_default_dtype():
    model = make(window=8)
    torch.set_default_dtype(torch.float64)
    try:
        check(model)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_on_several_threads(weights, rows, monkeypatch):
    monkeypatch.setattr(decoding, "_WORTH_A_TEAM", 0)
    monkeypatch.setattr(few_bits, "_WORTH_A_TEAM", 0)
    model = make_wide()
    if weights != "fp32":
        quantise(model, weights)
    with threads_of_torch(3):
        # More than FEW rows at once would go another way, which rounds their numbers, on some machines to bfloat16.
        check(model, rows, tolerance=8 * tolerances.BFLOAT16, plain_step=1)


@torch.no_grad()
def test_states_of_another_size_are_not_read():
    """Those of other heads are refused at once; of wider keys, which a map makes, the steps leave them to the op."""
    one, two = (make(changes={"num_key_value_heads": heads}) for heads in (1, 2))
    cache = one(random_ids(1, 20), use_cache=True).cache
    with pytest.raises(FastWeightsError, match="the cache is another model's; begin with a new one"):
        two(random_ids(1, 1), cache=cache)
    cache = make(feature_map="dpfp")(random_ids(1, 20), use_cache=True).cache
    assert decoding._begin(two, cache, 1) is None
    assert decoding._begin(two, two(random_ids(1, 20), use_cache=True).cache, 1) is not None
