"""What every rule must pass, and what each of them computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.layers.feature_maps import FEATURE_MAPS
from fastweights.layers.rules import RULES, AddRule, RuleShape, TokenMarks, make_rule
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from tests import tolerances
from tests.conftest import make_gpt2, make_llama, random_ids
from tests.models.checks import (
    PADDING,
    check_a_padded_batch_generates_what_each_row_does_alone,
    check_changed_and_saved_it_is_loaded_as_it_is,
    check_padding_gives_each_row_what_it_has_alone,
    check_pieces_equal_one_pass,
)
from tests.ops.problems import error

B, T, G, R, K, V, D = 2, 13, 2, 2, 5, 6, 8
SHAPE = RuleShape(D, G * R, G, K, V, value_gate=True, gate_bias=(2.0, 6.0))
NORMALISED = replace(SHAPE, normaliser=True)
NORMALISING = sorted(name for name, rule in RULES.items() if rule.normalises)


class WritesByItself(AddRule):
    """A rule with a recurrence of its own: padding and documents reach it as keys, values and gates."""

    def update(self, x, q, k, v, key_gate, value_gate, *, scale, state, keep_state, inclusive):
        state = x.new_zeros(len(x), *self.state_shape) if state is None else state
        outputs = []
        for t in range(x.shape[1]):
            before = state
            if key_gate is not None:
                state = key_gate[:, t].exp()[..., None] * state
            state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
            read = state if inclusive else before
            outputs.append(torch.einsum("bgrk,bgkv->bgrv", q[:, t].unflatten(1, (G, -1)), read).flatten(1, 2) * scale)
        return torch.stack(outputs, 1), state if keep_state else None


@pytest.fixture(params=[*sorted(RULES), "its own", *(f"{name}, normalised" for name in NORMALISING)])
def rule(request):
    torch.manual_seed(0)
    name, shape = request.param.split(",")[0], NORMALISED if "normalised" in request.param else SHAPE
    made = WritesByItself(shape) if name == "its own" else make_rule(name, shape)
    made.reset_parameters()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def inputs(seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Queries and keys are nowhere negative, as normalisers want them."""
    torch.manual_seed(seed)
    return torch.randn(B, T, D), torch.rand(B, T, G * R, K), torch.rand(B, T, G, K), torch.randn(B, T, G, V)


def call(rule, *tensors, marks=None, state=None, keep_state=True, inclusive=True):
    marks = TokenMarks() if marks is None else marks
    return rule(*tensors, scale=0.5, marks=marks, state=state, keep_state=keep_state, inclusive=inclusive)


both_reads = pytest.mark.parametrize("inclusive", [True, False], ids=["read after writing", "read before"])


def test_the_state_has_the_shape_that_the_rule_says(rule):
    o, state = call(rule, *inputs())
    assert o.shape == (B, T, G * R, V)
    assert state.shape == (B, *rule.state_shape)
    assert state.dtype == torch.float32
    assert call(rule, *inputs(), keep_state=False)[1] is None


@both_reads
def test_pieces_equal_one_pass(rule, inclusive):
    whole, last = call(rule, *inputs(), inclusive=inclusive)
    parts, state = [], None
    for cut in (slice(0, 4), slice(4, 5), slice(5, T)):
        o, state = call(rule, *(x[:, cut] for x in inputs()), state=state, inclusive=inclusive)
        parts.append(o)
    assert error(torch.cat(parts, 1), whole) <= tolerances.FLOAT32
    assert error(state, last) <= tolerances.FLOAT32


def test_padding_leaves_the_state_bit_for_bit_as_it_is(rule):
    _, before = call(rule, *inputs())
    nothing = TokenMarks(real=torch.zeros(B, T, dtype=torch.bool))
    _, after = call(rule, *inputs(2), marks=nothing, state=before)
    assert torch.equal(before, after)


def test_padding_that_is_not_finite_reaches_nothing(rule):
    real = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.7
    given = inputs()
    o, state = call(rule, *given, marks=TokenMarks(real))
    poisoned = (x.masked_fill(~real.view(B, T, *(1,) * (x.ndim - 2)), torch.nan) for x in given)
    after, last = call(rule, *poisoned, marks=TokenMarks(real))
    assert torch.equal(after[real], o[real])
    assert torch.equal(last, state)


@both_reads
def test_a_document_starts_with_an_empty_state(rule, inclusive):
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, 6] = starts[1, 0] = starts[1, 12] = True
    before, marks = torch.randn(B, *rule.state_shape), TokenMarks(starts=starts)
    o, state = call(rule, *inputs(), marks=marks, state=before, inclusive=inclusive)
    for row, begin, end in ((0, 6, T), (1, 0, 12), (1, 12, T)):
        alone, last = call(rule, *(x[row : row + 1, begin:end] for x in inputs()), inclusive=inclusive)
        assert error(o[row : row + 1, begin:end], alone) <= tolerances.FLOAT32
    assert error(state[1:], last) <= tolerances.FLOAT32


@both_reads
def test_gradients_are_finite_with_padding_and_documents(rule, inclusive):
    tensors = [x.requires_grad_() for x in inputs()]
    marks = TokenMarks(torch.rand(B, T) < 0.8, torch.rand(B, T) < 0.3)
    o, state = call(rule, *tensors, marks=marks, inclusive=inclusive)
    (o.square().sum() + state.square().sum()).backward()
    for x in (*tensors, *rule.parameters()):
        assert x.grad is None or x.grad.isfinite().all()
    assert tensors[1].grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_a_rule_has_learned_stays_in_float32(name):
    rule = make_rule(name, SHAPE)
    rule.reset_parameters()
    o, state = call(rule.bfloat16(), *(x.bfloat16() for x in inputs()))
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert {parameter.dtype for parameter in rule.parameters()} <= {torch.float32}


def test_additive_rule_is_a_sum_of_all_writes():
    _, q, k, v = inputs()
    o, state = call(make_rule("add", SHAPE), *inputs())
    writes = torch.einsum("btgk,btgv->btgkv", k, v).cumsum(1)
    expected = 0.5 * torch.einsum("btgrk,btgkv->btgrv", q.unflatten(2, (G, R)), writes).flatten(2, 3)
    assert error(o, expected) <= tolerances.FLOAT32
    assert error(state, writes[:, -1]) <= tolerances.FLOAT32
    assert not list(make_rule("add", SHAPE).parameters())


@both_reads
@pytest.mark.parametrize("normaliser", [True, False])
@pytest.mark.parametrize("name", NORMALISING)
def test_add_and_gated_are_these_weighted_sums_or_averages(name, normaliser, inclusive):
    """In quadratic form: token i's value has the weight (1 - g_i) g_{i+1} ... g_t (q_t·k_i), of add q_t·k_i."""
    rule = make_rule(name, NORMALISED if normaliser else SHAPE).double()
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter)
    x, q, k, v = (tensor.double() for tensor in inputs())
    kept = torch.ones(B, T, G, dtype=torch.float64)
    if name == "gated":
        kept = torch.sigmoid(x @ rule.key_gate.weight.T + rule.key_gate.bias)
    share = 1 - kept if name == "gated" else kept
    expected = torch.zeros(B, T, G, R, V, dtype=torch.float64)
    for t in range(T):
        end = t + 1 if inclusive else t
        weights = [share[:, i] * kept[:, i + 1 : end].prod(1) for i in range(end)]
        if weights:
            match = torch.einsum("bgrk,bigk->bigr", q[:, t].unflatten(1, (G, R)), k[:, :end])
            weights = torch.stack(weights, 1)[..., None] * match
            total = weights.sum(1)[..., None] if normaliser else 1 / 0.5
            expected[:, t] = torch.einsum("bigr,bigv->bgrv", weights, v[:, :end]) / total
    o, _ = call(rule, x, q, k, v, inclusive=inclusive)
    torch.testing.assert_close(o, expected.flatten(2, 3), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NORMALISING)
def test_a_normalised_rule_reads_averages_in_bfloat16_too(name):
    rule = make_rule(name, NORMALISED)
    rule.reset_parameters()
    short = [x.bfloat16() for x in inputs()]
    o, state = call(rule, *short)
    expected, _ = call(rule.double(), *(x.double() for x in short))
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert error(o, expected) <= tolerances.BFLOAT16


@pytest.mark.parametrize("name", NORMALISING)
def test_a_query_that_matches_no_key_reads_nothing(name):
    rule = make_rule(name, NORMALISED)
    rule.reset_parameters()
    x, q, k, v = inputs()
    q[..., 2:], k[..., :2], k[0] = 0, 0, 0
    for tensor in (q, k, v):
        tensor.requires_grad_()
    o, state = call(rule, x, q, k, v)
    assert not o.any()
    (o.sum() + state.square().sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_gated_heads_start_with_a_spread_of_time_constants():
    bias = {}
    for heads in (1, 2, 3):
        rule = make_rule("gated", replace(SHAPE, kv_heads=heads))
        rule.reset_parameters()
        assert not rule.key_gate.weight.any()
        bias[heads] = rule.key_gate.bias.tolist()
    assert bias == {1: [4.0], 2: [2.0, 6.0], 3: [2.0, 4.0, 6.0]}


def test_write_gates_start_at_their_biases():
    for name in ("delta", "gated_delta"):
        rules = {
            bias: make_rule(name, replace(SHAPE, kv_heads=3, write_bias=bias)) for bias in ((0.0, 0.0), (-4.0, -2.0))
        }
        for rule in rules.values():
            rule.reset_parameters()
            assert not rule.write_gate.weight.any()
        assert [rule.write_gate.bias.tolist() for rule in rules.values()] == [[0.0] * 3, [-4.0, -3.0, -2.0]]


def test_gates_of_low_rank_start_as_full_ones():
    low, full = (make_rule("decay", replace(SHAPE, gate_rank=rank)) for rank in (2, 0))
    for rule in (low, full):
        rule.reset_parameters()
    assert call(low, *inputs())[0].equal(call(full, *inputs())[0])
    assert low.key_gate.down.weight.shape == (2, D)
    call(low, *inputs())[0].square().sum().backward()
    assert low.key_gate.up.weight.grad.abs().sum() > 0


def test_an_unknown_rule_names_the_known_ones():
    with pytest.raises(FastWeightsError, match=f"rule 'forget' is unknown; known are {', '.join(RULES)}"):
        make_rule("forget", SHAPE)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("feature_map", sorted(FEATURE_MAPS))
def test_every_rule_and_map_works_in_a_model(rule, feature_map, tmp_path):
    """In pieces, among padding, in generate(); it is trained, saved and loaded."""
    # On the random Llama, DPFP's weights sum to 1e-7 in places: to divide by that is ill-conditioned anyhow.
    make = make_gpt2 if rule == "add" or (rule, feature_map) == ("gated", "dpfp") else make_llama
    model = convert(make(), ConversionConfig(rule=rule, feature_map=feature_map, window=8)).eval()
    check_pieces_equal_one_pass(model, (7, 8, 25))
    check_padding_gives_each_row_what_it_has_alone(model, sorted(PADDING)[0])
    check_a_padded_batch_generates_what_each_row_does_alone(model)
    ids = random_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    check_changed_and_saved_it_is_loaded_as_it_is(model, tmp_path)


@both_reads
@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_the_delta_rules_write_what_the_value_is_beyond_the_answer(name, inclusive):
    torch.manual_seed(0)
    rule = make_rule(name, SHAPE)
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter)
    x, q, k, v = (tensor.double() for tensor in inputs())
    rule.double()
    beta = (x @ rule.write_gate.weight.T + rule.write_gate.bias).sigmoid()
    decay = torch.ones_like(beta)
    if name == "gated_delta":
        decay = (x @ rule.decay.key_gate.weight.T + rule.decay.key_gate.bias).sigmoid()
    state, read = torch.zeros(B, G, K, V, dtype=torch.float64), []
    for t in range(T):
        before, key = state, k[:, t] / k[:, t].norm(dim=-1, keepdim=True)
        state = decay[:, t, :, None, None] * state
        answer = torch.einsum("bgkv,bgk->bgv", state, key)
        state = state + torch.einsum("bg,bgk,bgv->bgkv", beta[:, t], key, v[:, t] - answer)
        queries = q[:, t].unflatten(1, (G, R))
        read.append(torch.einsum("bgrk,bgkv->bgrv", queries, state if inclusive else before).flatten(1, 2) * 0.5)
    o, final = call(rule, x, q, k, v, inclusive=inclusive)
    assert error(o, torch.stack(read, 1)) < 1e-6
    assert error(final, state) < 1e-6


@both_reads
@pytest.mark.parametrize("features", [None, 2, 7])
def test_delta_and_average_is_the_sum_of_what_both_say(features, inclusive):
    """The average in quadratic form: token i's value has the weight g_{i+1} ... g_t φ(q_t)·φ(k_i)."""
    torch.manual_seed(0)
    rule = make_rule("delta_and_average", replace(SHAPE, features=features)).double()
    assert rule.state_shape == (G, K + 2 * (features or K), V + 1)
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter)
    x, q, k, v = (tensor.double() for tensor in inputs())
    kept = (x @ rule.average.key_gate.weight.T + rule.average.key_gate.bias).sigmoid()
    features = [
        torch.cat([(sign * torch.einsum("hkd,bthd->bthk", part.weight, y)).softmax(-1) for sign in (1, -1)], -1)
        for part, y in ((rule.query_map, q), (rule.key_map, k))
    ]
    match = torch.einsum("btgrk,bigk->btigr", features[0].unflatten(2, (G, R)), features[1])
    expected = torch.zeros(B, T, G, R, V, dtype=torch.float64)
    for t in range(T):
        end = t + 1 if inclusive else t
        if end:
            decay = torch.stack([kept[:, i + 1 : end].prod(1) for i in range(end)], 1)
            weights = decay[..., None] * match[:, t, :end]
            expected[:, t] = torch.einsum("bigr,bigv->bgrv", weights / weights.sum(1, keepdim=True), v[:, :end])
    told, _ = call(rule.delta, x, q, k, v, inclusive=inclusive)
    o, _ = call(rule, x, q, k, v, inclusive=inclusive)
    assert error(o, told + rule.share[:, None] * expected.flatten(2, 3)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_delta_rule_takes_keys_of_zero_in_any_precision(dtype):
    rule = make_rule("delta", SHAPE)
    rule.reset_parameters()
    x, q, k, v = (tensor.to(dtype) for tensor in inputs())
    k[:, ::3] = 0
    assert call(rule, x, q, k, v)[0].isfinite().all()


def test_the_delta_rule_answers_with_the_last_value_of_a_key():
    """With β = 1 it replaces, where a sum would add."""
    rule = make_rule("delta", SHAPE)
    rule.reset_parameters()
    with torch.no_grad():
        rule.write_gate.bias.fill_(50.0)
    x, _, k, v = inputs()
    k = k[:, :1].expand_as(k)
    o, _ = call(rule, x, (k / k.norm(dim=-1, keepdim=True)).repeat_interleave(R, 2), k, v)
    torch.testing.assert_close(o, 0.5 * v.repeat_interleave(R, 2))
