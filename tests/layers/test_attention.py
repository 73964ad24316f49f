import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.evaluation.parts import without_fast_weights
from fastweights.layers import FastWeightAttention
from fastweights.layers.window import WindowEmbeddings
from fastweights.models import convert
from fastweights.models.replacement import inverse_rotation
from fastweights.ops import decay_rule
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.finetune import leave_windows_alone
from tests.conftest import make_gpt2, make_llama, random_ids


@pytest.mark.parametrize("value_gate", [True, False])
def test_output_is_the_papers_formula(value_gate):
    layer = convert(make_gpt2(), ConversionConfig(value_gate=value_gate)).fast_attentions()[1]
    assert isinstance(layer, FastWeightAttention)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        layer.fast_unit.copy_(torch.rand(2) + 0.1)
        x = torch.randn(2, 11, 32)
        q, k, v = (y.unflatten(-1, (2, 16)) for y in layer.c_attn(x).chunk(3, -1))
        f = torch.sigmoid(layer.rule.key_gate(x)).unflatten(-1, (2, 16))
        z = torch.sigmoid(layer.rule.value_gate(x)).unflatten(-1, (2, 16)) if value_gate else torch.ones_like(v)
        state, outputs = torch.zeros(2, 2, 16, 16), []
        for t in range(11):
            decay = f[:, t, :, :, None] * z[:, t, :, None, :]
            state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * 16**-0.5)
        y = torch.stack(outputs, 1) * (layer.fast_scale * layer.fast_unit)[:, None]
        expected = layer.c_proj(y.flatten(-2))
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_grouped_heads_read_the_state_they_share():
    model = make_llama()
    layer = convert(model).fast_attentions()[0]
    x = torch.randn(1, 9, 32)
    positions = model.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        q, k, v = layer.project(x)
        q, k = layer.projections.rotate(q, k, positions)
        assert (q.shape[2], k.shape[2]) == (4, 2)
        gates = [gate.repeat_interleave(2, 2) for gate in layer.rule.log_gates(x)]
        k, v = (y.repeat_interleave(2, 2) for y in (k, v))
        expected, _ = decay_rule(q, k, v, *gates, scale=layer.scaling, backend="reference")
        fast, window = layer.read(x, position_embeddings=positions)
    assert window is None
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rotary", [True, False])
def test_rotary_can_be_left_out_of_the_fast_weights_but_not_of_the_window(rotary):
    model = make_llama()
    layer = convert(model, ConversionConfig(rotary=rotary, window=4, sinks=0)).fast_attentions()[0]
    x = torch.randn(1, 9, 32)
    with torch.no_grad():
        outputs = []
        for step in (1, 7):
            at, behind = (model.model.rotary_emb(x, (torch.arange(9)[None] - back) * step) for back in (0, 3))
            outputs.append(layer.read(x, None, at, {4: WindowEmbeddings(None, inverse_rotation(*behind))}))
    first, second = outputs
    assert torch.allclose(first[0], second[0], rtol=1e-4, atol=1e-5) == (not rotary)
    assert not torch.allclose(first[1], second[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rotary", [True, False])
def test_fast_weights_beside_a_window_hold_what_has_left_it_and_is_no_sink(rotary):
    model = convert(make_llama(), ConversionConfig(rule="add", window=4, sinks=2, rotary=rotary))
    layer = model.fast_attentions()[0]
    with torch.no_grad():
        layer.window_scale.zero_()
        x, n = torch.randn(1, 20, 32), torch.arange(20)
        embeddings = model.model.base.rotary_emb(x, n[None])
        q, k, v = layer.project(x)
        if rotary:
            q, k = layer.projections.rotate(q, k, embeddings)
        k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
        held = (n[:, None] - n >= 4) & (n >= 2)
        y = (torch.einsum("bthd,bihd->bhti", q, k) * layer.scaling * held) @ v.transpose(1, 2)
        expected = layer.output(y.transpose(1, 2).flatten(-2))
        window_embeddings = model.model.window_embeddings(x)
        found, _ = layer(x, position_embeddings=embeddings, window_embeddings=window_embeddings)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", ["leaving", "all"])
def test_values_of_their_own_are_written_and_the_window_has_the_pretrained_ones(write):
    models = [convert(make_llama(), ConversionConfig(window=4, write=write, value_map=of)) for of in (False, True)]
    layer, own = (model.fast_attentions()[0] for model in models)
    x, at = torch.randn(1, 20, 32), models[0].model.base.rotary_emb(torch.randn(1, 20, 32), torch.arange(20)[None])
    beside_it = models[0].model.window_embeddings(x)
    with torch.no_grad():
        for one, other in zip(layer.read(x, None, at, beside_it), own.read(x, None, at, beside_it), strict=True):
            assert one.equal(other)  # at the start
        matrices = own.value_map.weight.normal_()
        # Without gates of their channels, a matrix times the values is the same matrix times what is read.
        layer.rule.value_gate = own.rule.value_gate = None
        fast, window = layer.read(x, None, at, beside_it)
        found, beside = own.read(x, None, at, beside_it)
    assert beside.equal(window)
    expected = torch.einsum("bthv,hwv->bthw", fast, matrices.repeat_interleave(2, 0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_a_gate_on_the_mix_weighs_fast_weights_and_window_token_by_token(window):
    """It starts as if it were not there."""
    plain, gated = (convert(make_llama(), ConversionConfig(window=window, mix_gate=on)) for on in (False, True))
    ids = random_ids(2, 13)
    for model in (plain, gated):
        for layer in model.fast_attentions():
            layer.fast_scale.data.fill_(0.7)
    assert gated(input_ids=ids).logits.equal(plain(input_ids=ids).logits)
    layer = gated.fast_attentions()[0]
    x, at = torch.randn(1, 20, 32), gated.model.base.rotary_emb(torch.randn(1, 20, 32), torch.arange(20)[None])
    beside_it = gated.model.window_embeddings(x)
    with torch.no_grad():
        for parameter in layer.mix_gate.parameters():
            parameter.normal_()
        fast, of_window = layer.read(x, None, at, beside_it)
        g = 2 * torch.sigmoid(x @ layer.mix_gate.gate.weight.T + layer.mix_gate.gate.bias)[..., None]
        y = 0.7 * g * fast
        if window:
            y = y + (1 - layer.mix_gate.share[:, None] * g) * of_window
        found, _ = layer(x, position_embeddings=at, window_embeddings=beside_it)
        torch.testing.assert_close(found, layer.output(y.flatten(-2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["part", "control"])
def test_a_window_alone_has_no_gate(stage):
    model = convert(make_llama(), ConversionConfig(window=4, mix_gate=True))
    expected = convert(make_llama(), ConversionConfig(window=4))
    for layer in model.fast_attentions():
        for parameter in layer.mix_gate.parameters():
            parameter.data.normal_()
    ids = random_ids(2, 13)
    if stage == "control":
        leave_windows_alone(model)
    with without_fast_weights(model), without_fast_weights(expected):
        for cached in (False, True):
            assert model(input_ids=ids, use_cache=cached).logits.equal(expected(input_ids=ids).logits)


def test_gates_ignore_autocast():
    layer = convert(make_gpt2()).fast_attentions()[0]
    x = torch.randn(1, 5, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.rule.log_gates(x)
    outside = layer.rule.log_gates(x)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(inside, outside, strict=True))


def test_settings_name_what_is_known():
    with pytest.raises(FastWeightsError, match="rule 'forget' is unknown; known are decay"):
        ConversionConfig(rule="forget")


@pytest.mark.parametrize("write", ["leaving", "all"])
def test_a_window_on_its_own_is_that_of_a_factor_of_0(write):
    """And its rule is not asked, but where a cache wants the state."""
    model = convert(make_llama(), ConversionConfig(window=4, write=write))
    for layer in model.fast_attentions():
        layer.fast_scale.data.zero_()
    ids = random_ids(2, 13)
    expected = model(input_ids=ids).logits
    cached = model(input_ids=ids, use_cache=True).cache
    for layer in model.fast_attentions():
        layer.window_only = True
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    own = model(input_ids=ids, use_cache=True).cache
    for one, other in zip(own.layers, cached.layers, strict=True):
        torch.testing.assert_close(one.state(), other.state())
    for layer in model.fast_attentions():
        layer.rule = None
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
