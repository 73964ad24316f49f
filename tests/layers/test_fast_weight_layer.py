"""The Fast Weight Layer against its definition: gradient steps taken one by one on a copy of its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm, linear, relu

from fastweights.errors import FastWeightsError
from fastweights.layers.fast_weight_layer import NO_LABEL, FastWeightLayer, FastWeightLayerState, next_token_gradient
from fastweights.layers.quantised import Int8Linear
from fastweights.ops import few_bits
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from tests import tolerances
from tests.live_memory import LiveMemory
from tests.ops.problems import error

D, VOCABULARY = 6, 11
DECAYS = ("none", "scalar", "channel", "input")


def block(
    decay: str = "scalar", *, dtype=torch.float64, d: int = D, updates: bool = True, segment: int = 7, **settings
):
    """A layer whose every parameter is away from its starting point, and an unembedding with a bias."""
    torch.manual_seed(0)
    settings |= {"decay": decay, "updates": updates, "segment": segment}
    layer = FastWeightLayer(d, FastWeightLayerSettings(expansion=2, **settings)).to(dtype)
    unembedding = nn.Linear(d, VOCABULARY).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        layer.output_scale.normal_()
        if updates:
            # Large steps, so that a wrong one cannot hide.
            layer.log_step_size.copy_(torch.linspace(-1.5, -0.5, 6))
            for name, parameter in layer.named_parameters():
                if "decay" in name and not name.endswith("weight"):
                    parameter.copy_(torch.randn_like(parameter) + 1.5)
    return layer, unembedding


def text(batch: int, length: int, dtype=torch.float64, d: int = D, ignored: float = 0.2):
    hidden = torch.randn(batch, length, d, dtype=dtype)
    labels = torch.randint(VOCABULARY, (batch, length))
    labels[torch.rand(batch, length) < ignored] = NO_LABEL
    return hidden, labels


def by_hand(layer: FastWeightLayer, unembedding: nn.Linear, hidden, labels):
    """One row, position by position: a copy of the weights takes an SGD step after each, and fades towards them.

    The gradient is that of the weights as the segment began, or of the trained ones.
    """
    names = ("up.weight", "up.bias", "down.weight", "down.bias", "norm_scale", "norm_offset")
    slow = {name: parameter.detach().clone().requires_grad_() for name, parameter in layer.named_parameters()}
    changes = [torch.zeros_like(slow[name]) for name in names]

    def run(weights, h):
        r = linear(relu(linear(h, weights[0], weights[1])).square(), weights[2], weights[3])
        return h + slow["output_scale"] * layer_norm(r, (len(h),), weights[4], weights[5])

    outputs, taken, segment = [], 0, layer.settings.segment
    seen = [slow[name] for name in names]
    for h, label in zip(hidden, labels, strict=True):
        weights = [slow[name] + change for name, change in zip(names, changes, strict=True)]
        outputs.append(run(weights, h).detach())
        if label == NO_LABEL:
            continue
        if segment and taken and taken % segment == 0:
            seen = [w.detach().requires_grad_() for w in weights]
        taken += 1
        loss = loss_among(unembedding(run(seen, h)), int(label), layer.settings.slow_vocabulary)
        gradients = torch.autograd.grad(loss, seen)
        kept = kept_shares(layer, h)
        for i, step in enumerate(layer.log_step_size.detach().exp()):
            changes[i] = kept[i] * changes[i] - step * gradients[i]
    return torch.stack(outputs)


def loss_among(logits, label: int, vocabulary: int):
    """Cross-entropy over the first tokens, or all, and the label."""
    among = {*range(min(vocabulary or len(logits), len(logits))), label}
    return logits[[*among]].logsumexp(-1) - logits[label]


def kept_shares(layer: FastWeightLayer, h):
    """How much of each parameter's change a step keeps, in the shape of the parameter."""
    if layer.settings.decay == "none":
        return [torch.ones((), dtype=h.dtype)] * 6
    if layer.settings.decay == "channel":
        gate = {name: logit.detach().sigmoid() for name, logit in layer.decay_logits.items()}
        up = gate["up_value"][:, None] * gate["up_key"]
        down = gate["down_value"][:, None] * gate["down_key"]
        scale, offset = gate["norm_value"].chunk(2)
        return [up[:, :-1], up[:, -1], down[:, :-1], down[:, -1], scale, offset]
    logits = layer.decay_logit if layer.settings.decay == "scalar" else layer.decay_gate(h)
    return logits.detach().sigmoid().repeat_interleave(2)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("segment", "slow_vocabulary"), [(0, 0), (1, 0), (5, 0), (100, 0), (5, 4)])
def test_equals_gradient_steps_taken_one_by_one(segment, slow_vocabulary, decay):
    layer, unembedding = block(decay, segment=segment, slow_vocabulary=slow_vocabulary)
    with torch.no_grad():
        layer.log_step_size.sub_(1.0)  # large ones, against gradients of weights that they have changed, diverge
    hidden, labels = text(3, 21)
    outputs, _ = layer(hidden, labels, unembedding)
    changed = (outputs - layer(hidden, torch.full_like(labels, NO_LABEL), unembedding)[0]).abs().amax(-1)
    assert (changed[:, 5:] > 1e-3).all(), "the steps must matter for this test to mean anything"
    for row in range(3):
        torch.testing.assert_close(
            outputs[row].detach(), by_hand(layer, unembedding, hidden[row], labels[row]), rtol=1e-9, atol=1e-9
        )


def test_a_segment_sees_the_weights_that_its_past_has_made():
    hidden, labels = text(1, 21, ignored=0)
    layers = [block(segment=segment) for segment in (0, 10, 5)]
    outputs = [layer(hidden, labels, unembedding)[0] for layer, unembedding in layers]
    change = (outputs[0] - outputs[1]).abs().amax(-1)[0], (outputs[1] - outputs[2]).abs().amax(-1)[0]
    assert change[0][:11].max() < 1e-12  # 0 to 9 wrote at the trained weights, and 10 has not written yet
    assert change[0][11] > 1e-3
    assert change[1][:6].max() < 1e-12
    assert change[1][6] > 1e-3


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("segment", [0, 2])
def test_gradients_of_everything(segment, decay):
    layer, unembedding = block(decay, d=3, segment=segment)
    hidden, labels = text(2, 5, d=3)
    parameters = [*layer.parameters(), *unembedding.parameters()]
    names = [
        *(f"layer.{n}" for n, _ in layer.named_parameters()),
        *(f"unembedding.{n}" for n, _ in unembedding.named_parameters()),
    ]
    holder = nn.ModuleDict({"layer": layer, "unembedding": unembedding})

    n = len(layer.initial_state(hidden).tensors()[:6])
    steps = torch.tensor([0, 1])

    def run(hidden, *values):
        tensors, values = values[:n], values[n:]
        state = FastWeightLayerState.from_tensors([*tensors, steps] if segment else [*tensors])
        arguments = (hidden, labels, unembedding, state)
        originals = {name: getattr_path(holder, name) for name in names}
        try:
            for name, value in zip(names, values, strict=True):
                set_path(holder, name, value)
            y, state = layer(*arguments)
        finally:
            for name, value in originals.items():
                set_path(holder, name, value)
        return y, *state.tensors()[:n]

    state = [torch.randn_like(x) * 0.1 for x in layer.initial_state(hidden).tensors()[:n]]
    values = [x.detach().clone().requires_grad_() for x in (hidden, *state, *parameters)]
    torch.autograd.gradcheck(run, values, fast_mode=True)


def getattr_path(module: nn.Module, path: str):
    *parents, name = path.split(".")
    parent = module.get_submodule(".".join(parents))
    return parent._parameters[name]


def set_path(module: nn.Module, path: str, value) -> None:
    *parents, name = path.split(".")
    module.get_submodule(".".join(parents))._parameters[name] = value


def test_slow_gradient_is_autograds():
    _, unembedding = block()
    hidden, labels = text(2, 7)
    hidden.requires_grad_()
    loss = cross_entropy(unembedding(hidden).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
    (expected,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(next_token_gradient(hidden, labels, unembedding), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocabulary", [1, 4, VOCABULARY - 1, VOCABULARY, 2 * VOCABULARY])
def test_slow_gradient_over_some_tokens_and_the_label(vocabulary, bias):
    _, unembedding = block()
    unembedding.bias = unembedding.bias if bias else None
    hidden, labels = text(2, 7)
    hidden.requires_grad_()
    rows = zip(unembedding(hidden).flatten(0, 1), labels.flatten().tolist(), strict=True)
    losses = [loss_among(logits, label, vocabulary) for logits, label in rows if label != NO_LABEL]
    (expected,) = torch.autograd.grad(sum(losses), hidden)
    got = next_token_gradient(hidden, labels, unembedding, vocabulary)
    torch.testing.assert_close(got, expected)

    def run(hidden, *parameters):
        other = nn.Linear(D, VOCABULARY, bias=bias)
        for name, parameter in zip(("weight", "bias"), parameters, strict=False):
            set_path(other, name, parameter)
        return next_token_gradient(hidden, labels, other, vocabulary)

    torch.autograd.gradcheck(run, [hidden, *unembedding.parameters()], fast_mode=True)


@pytest.mark.skipif(not few_bits.lanes(), reason="this machine has no kernel of eight bits: it needs AVX2 and Numba")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocabulary", [0, 1, 40, 200])
@torch.no_grad()
def test_slow_gradient_by_eight_bits(vocabulary, bias):
    torch.manual_seed(0)
    kept = Int8Linear.of(nn.Linear(64, 80, bias=bias))
    hidden, labels = 3 * torch.randn(2, 7, 64), torch.randint(80, (2, 7))
    labels[0, 2:5] = labels[1, 6] = NO_LABEL
    expected = next_token_gradient(hidden, labels, kept.whole(), vocabulary)
    found = next_token_gradient(hidden, labels, kept, vocabulary)
    assert error(found, expected) <= tolerances.FIFTEEN_BITS
    assert not found[labels == NO_LABEL].any()
    labels[:] = NO_LABEL
    assert not next_token_gradient(hidden, labels, kept, vocabulary).any()


def test_slow_gradient_does_not_depend_on_its_chunks(monkeypatch):
    _, unembedding = block()
    hidden, labels = text(2, 7)
    whole = next_token_gradient(hidden, labels, unembedding)
    monkeypatch.setattr("fastweights.layers.next_token_gradient._LOGITS", 3 * VOCABULARY)
    torch.testing.assert_close(next_token_gradient(hidden, labels, unembedding), whole, rtol=0, atol=1e-15)


def test_logits_of_a_whole_text_are_never_held():
    layer = FastWeightLayer(16)
    unembedding = nn.Linear(16, 40_000, bias=False)
    hidden, labels = torch.randn(1, 1024, 16), torch.randint(40_000, (1, 1024))
    with torch.no_grad():
        layer.output_scale.fill_(1.0)
    logits = 4 * 1024 * 40_000
    with LiveMemory() as memory:
        unembedding(hidden)
    assert memory.peak >= logits
    for leaf in (hidden, hidden.clone().requires_grad_()):
        with LiveMemory() as memory:
            y, _ = layer(leaf, labels, unembedding)
            y.sum().backward()
        assert logits / 100 < memory.peak < logits / 3


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("segment", [0, 7])
@pytest.mark.parametrize("cuts", [(1,), (40,), (1, 2, 3, 64, 99)], ids=str)
def test_cutting_the_text_changes_nothing(segment, decay, cuts):
    layer, unembedding = block(decay, dtype=torch.float32, segment=segment)
    tame(layer)
    hidden, labels = text(2, 100, torch.float32)
    whole, last = layer(hidden, labels, unembedding)
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, 100), strict=True):
        part, state = layer(hidden[:, start:stop], labels[:, start:stop], unembedding, state)
        parts.append(part)
    close(torch.cat(parts, 1), whole)
    for a, b in zip(state.tensors(), last.tensors(), strict=True):
        close(a, b)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("segment", [0, 7])
def test_a_row_does_not_depend_on_its_batch_mates_or_on_padding(segment, decay):
    layer, unembedding = block(decay, dtype=torch.float32, segment=segment)
    tame(layer)
    hidden, labels = text(3, 40, torch.float32)
    together, states = layer(hidden, labels, unembedding)
    alone, state = layer(hidden[1:2], labels[1:2], unembedding)
    close(alone, together[1:2])
    padded = torch.cat((torch.randn(1, 7, D), hidden[1:2], torch.randn(1, 5, D)), 1)
    ignored = torch.cat((torch.full((1, 7), NO_LABEL), labels[1:2], torch.full((1, 5), NO_LABEL)), 1)
    among_padding, state_after = layer(padded, ignored, unembedding)
    close(among_padding[:, 7:47], alone)
    tensors = (x.tensors() for x in (state, states, state_after))
    for one, mate, padded_state in zip(*tensors, strict=True):
        close(one, mate[1:2])
        close(padded_state, one)


@pytest.mark.parametrize("segment", [0, 7])
def test_no_tokens_pass_the_state_through(segment):
    layer, unembedding = block(segment=segment)
    hidden, labels = text(2, 9)
    _, state = layer(hidden, labels, unembedding)
    y, after = layer(hidden[:, :0], labels[:, :0], unembedding, state)
    assert y.shape == (2, 0, D)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), after.tensors(), strict=True))


def test_a_position_without_a_label_leaves_the_state_bit_for_bit():
    layer, unembedding = block("input", dtype=torch.float32)
    hidden, labels = text(2, 9, torch.float32)
    _, state = layer(hidden, labels, unembedding)
    _, after = layer(hidden, torch.full_like(labels, NO_LABEL), unembedding, state)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), after.tensors(), strict=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_no_output_depends_on_its_own_or_a_later_label(decay):
    layer, unembedding = block(decay, dtype=torch.float32)
    hidden, labels = text(2, 90, torch.float32, ignored=0)
    before, _ = layer(hidden, labels, unembedding)
    for t in (0, 15, 16, 64, 88):
        changed_labels, changed_hidden = labels.clone(), hidden.clone()
        changed_labels[:, t:] = (labels[:, t:] + 1) % VOCABULARY
        changed_hidden[:, t + 1 :] += 1
        after, _ = layer(changed_hidden, changed_labels, unembedding)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        if t < 88:
            assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_starts_as_the_identity_and_can_leave_it():
    layer = FastWeightLayer(D, FastWeightLayerSettings())
    unembedding = nn.Linear(D, VOCABULARY)
    hidden, labels = text(2, 12, torch.float32)
    y, _ = layer(hidden, labels, unembedding)
    assert torch.equal(y, hidden)
    cross_entropy(unembedding(y).flatten(0, 1), labels.flatten()).backward()
    assert layer.output_scale.grad is not None
    assert layer.output_scale.grad.abs().min() > 0


def test_without_updates_it_is_an_ordinary_block():
    layer, unembedding = block(updates=False)
    hidden, labels = text(2, 5)
    y, state = layer(hidden, labels, unembedding)
    assert state is None
    r = layer.down(relu(layer.up(hidden)).square())
    n = layer_norm(r, (D,), layer.norm_scale, layer.norm_offset)
    torch.testing.assert_close(y, hidden + layer.output_scale * n)


def test_bf16_hidden_states_keep_fp32_weights():
    layer, _ = block(dtype=torch.float32)
    unembedding = nn.Linear(D, VOCABULARY, dtype=torch.bfloat16)
    hidden, labels = text(2, 5, torch.float32)
    y, state = layer(hidden.bfloat16(), labels, unembedding)
    assert y.dtype == torch.bfloat16
    assert {x.dtype for x in (*state.now, *state.seen)} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "magic"}, "known are none, scalar, channel, input"),
        ({"expansion": 0}, "at least 1"),
        ({"segment": -1}, "allowed are 0"),
        ({"slow_vocabulary": -1}, "allowed are 0"),
        ({"initial_step_size": 0.0}, "positive"),
        ({"initial_decay": 1.0}, "between 0 and 1"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(FastWeightsError, match=message):
        FastWeightLayerSettings(**settings)


def tame(layer: FastWeightLayer) -> None:
    """Steps of a trained size: without decay, hundreds of large ones diverge and no two sums agree."""
    with torch.no_grad():
        layer.log_step_size.fill_(-5.0)


def close(a, b) -> None:
    error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)
    assert error <= tolerances.FAST_WEIGHT_LAYER, float(error)
