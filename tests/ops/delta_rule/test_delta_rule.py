"""What every backend of the delta rule must do: agree with the reference, and be exact where it can be."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweights.ops import delta_rule
from tests import tolerances
from tests.ops.delta_rule.problems import Problem, inputs, run, truth
from tests.ops.problems import assert_close, assert_close_at_random, error, errors, options

FAST = ("chunked", "cpu")
ALL = ("reference", *FAST)
SOME = 40
"""Tokens; Triton's interpreter takes fewer."""
LENGTHS = (1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 128, 129, 257, 1024)
WIDTHS = ((16, 16), (48, 64), (64, 48), (80, 128), (128, 80), (64, 64), (16, 128), (128, 16), (33, 17))


def _covering() -> list[Problem]:
    """Each length with two widths; decay, heads and the other choices take turns."""
    heads = itertools.cycle([(2, 2), (4, 2), (3, 1), (1, 1)])
    strongest = itertools.cycle([0.3, 20.0, 0.02])
    flags = itertools.cycle(itertools.product((True, False), repeat=3))
    problems = []
    for i, (T, j) in enumerate(itertools.product(LENGTHS, range(2))):
        K, V = WIDTHS[i % len(WIDTHS)] if T < 1024 else ((64, 64), (16, 48))[j]
        (decay, initial_state, inclusive), (H, G) = next(flags), next(heads)
        problems.append(Problem(T, K, V, 2 if T < 100 else 1, H, G, decay, next(strongest), initial_state, inclusive))
    return problems


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("problem", _covering(), ids=str)
def test_agrees_with_the_reference_at_any_length_and_width(problem, backend):
    results = run(inputs(problem, torch.float32), backend, **options(problem))
    assert_close(results, truth(problem, torch.float32), tolerances.FLOAT32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("strongest", [0.0, 0.3, 20.0, 200.0])
def test_agrees_with_the_reference_for_any_decay_and_beta(strongest, beta, inclusive, backend):
    problem = Problem(37, 16, 20, 1, 4, 2, True, strongest, inclusive=inclusive, seed=1)
    tensors = inputs(problem, torch.float32)
    tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    doubles = {name: x.double() for name, x in tensors.items()}
    results = run(tensors, backend, **options(problem))
    assert_close(results, run(doubles, "reference", **options(problem)), tolerances.FLOAT32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("cu_seqlens", [(0, 90), (0, 0, 1, 64, 64, 90), (0, 65, 90, 90)], ids=str)
def test_agrees_with_the_reference_on_packed_sequences(cu_seqlens, inclusive, backend):
    problem = Problem(90, 16, 32, H=4, strongest=5.0, inclusive=inclusive, cu_seqlens=cu_seqlens)
    results = run(inputs(problem, torch.float32), backend, **options(problem))
    assert_close(results, truth(problem, torch.float32), tolerances.FLOAT32)


@pytest.mark.parametrize("backend", ALL)
def test_packed_sequences_do_not_see_each_other(backend):
    problem = Problem(30, 8, 8, cu_seqlens=(0, 11, 30))
    tensors = inputs(problem, torch.float32)
    o, final_state = delta_rule(**tensors, **options(problem), backend=backend)
    state = tensors.pop("initial_state")
    alone = {"scale": problem.scale, "output_final_state": True, "backend": backend}
    for n, (start, end) in enumerate([(0, 11), (11, 30)]):
        part = {name: x[:, start:end] for name, x in tensors.items()}
        o_n, state_n = delta_rule(**part, **alone, initial_state=state[n : n + 1])
        assert error(o[:, start:end], o_n) <= tolerances.FLOAT32
        assert error(final_state[n : n + 1], state_n) <= tolerances.FLOAT32


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, tolerances.BFLOAT16), (torch.float16, tolerances.FLOAT16)], ids=str
)
def test_low_precision_inputs_have_a_float32_state_and_only_their_own_rounding(dtype, tolerance, backend):
    problem = Problem(100, 48, 64, 1, 4, 2, seed=2)
    results = run(inputs(problem, dtype), backend, **options(problem))
    expected = truth(problem, dtype)
    assert results["o"].dtype == results["dq"].dtype == results["dbeta"].dtype == results["dlog_decay"].dtype == dtype
    assert results["final_state"].dtype == results["dinitial_state"].dtype == torch.float32
    assert errors(results, expected)["final_state"] <= tolerances.FLOAT32
    assert_close(results, expected, tolerance)


def drawn(draw: Callable, longest: int = 90) -> Problem:
    """Any problem of so many tokens at most."""
    G = draw(st.integers(1, 3))
    T = draw(st.integers(0, longest))
    ends = draw(st.none() | st.lists(st.integers(0, T), max_size=3))
    return Problem(
        T,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 2)) if ends is None else 1,
        G * draw(st.integers(1, 3)),
        G,
        draw(st.booleans()),
        draw(st.sampled_from([0.01, 1.0, 20.0, 200.0])),
        draw(st.booleans()),
        draw(st.booleans()),
        None if ends is None else (0, *sorted(ends), T),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_agrees_with_the_reference_on_random_problems(data):
    problem = drawn(data.draw)
    for backend in FAST:
        results = run(inputs(problem, torch.float32), backend, **options(problem))
        assert_close_at_random(results, truth(problem, torch.float32), tolerances.FLOAT32)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
def test_splitting_a_sequence_anywhere_changes_nothing(inclusive, backend):
    problem = Problem(75, 16, 16, H=4, inclusive=inclusive, seed=3)
    tensors, kwargs = inputs(problem, torch.float32), options(problem) | {"backend": backend}
    whole, final_state = delta_rule(**tensors, **kwargs)
    state = tensors.pop("initial_state")
    for cut in (0, 1, 15, 16, 17, 33, 64, 74, 75):
        first = {name: x[:, :cut] for name, x in tensors.items()}
        second = {name: x[:, cut:] for name, x in tensors.items()}
        o_first, carried = delta_rule(**first, **kwargs, initial_state=state)
        o_second, state_after = delta_rule(**second, **kwargs, initial_state=carried)
        o = torch.cat([o_first, o_second], dim=1)
        assert error(o, whole) <= tolerances.FLOAT32
        assert error(state_after, final_state) <= tolerances.FLOAT32


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("inclusive", [True, False])
def test_a_future_token_changes_no_bit_of_an_earlier_output(inclusive, decay, backend):
    problem = Problem(70, 16, 16, 1, 2, 1, decay, inclusive=inclusive, seed=4)
    tensors, kwargs = inputs(problem, torch.float32), options(problem) | {"backend": backend}
    o, _ = delta_rule(**tensors, **kwargs)
    for t in (0, 1, 8, 15, 16, 31, 40, 63, 64, 69):
        changed = {name: x if x is None else x.clone() for name, x in tensors.items()}
        for name in ("q", "k", "v"):
            changed[name][:, t] = 100 * torch.randn_like(changed[name][:, t])
        changed["beta"][:, t] = 3.0
        if decay:
            changed["log_decay"][:, t] = -9.0
        after, _ = delta_rule(**changed, **kwargs)
        assert torch.equal(after[:, :t], o[:, :t])
        assert not torch.equal(after[:, t:], o[:, t:])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("decay", [True, False])
def test_masked_tokens_leave_the_state_bit_for_bit(decay, backend):
    tensors = inputs(Problem(70, 16, 20, B=2, decay=decay, seed=5), torch.float32)
    for name in ("k", "v", "log_decay"):
        if tensors[name] is not None:
            tensors[name].zero_()
    _, final_state = delta_rule(**tensors, output_final_state=True, backend=backend)
    assert torch.equal(final_state, tensors["initial_state"])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("inclusive", [True, False])
def test_padding_changes_no_bit_of_the_real_tokens(inclusive, backend):
    tensors = inputs(Problem(41, 16, 20, seed=6), torch.float32)
    kwargs = {"output_final_state": True, "inclusive": inclusive, "backend": backend}
    padded = torch.zeros(41, dtype=torch.bool)
    padded[[0, 1, 2, 9, 20, 21, 40]] = True
    masked, real = dict(tensors), dict(tensors)
    for name in ("q", "k", "v", "beta", "log_decay"):
        real[name] = tensors[name][:, ~padded]
        if name in ("k", "v", "log_decay"):
            masked[name] = tensors[name].clone()
            masked[name][:, padded] = 0.0
    o, state = delta_rule(**masked, **kwargs)
    o_real, state_real = delta_rule(**real, **kwargs)
    assert torch.equal(o[:, ~padded], o_real)
    assert torch.equal(state, state_real)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("at", [0, 12])
@pytest.mark.parametrize("name", ["v", "beta", "log_decay"])
def test_nan_reaches_the_outputs_after_it(name, at, backend):
    tensors = inputs(Problem(20, 16, 16, H=1, G=1), torch.float32)
    tensors["beta"].fill_(0.5)
    tensors[name][:, at] = torch.nan
    o, state = delta_rule(**tensors, output_final_state=True, backend=backend)
    assert backend == "chunked" or o[:, :at].isfinite().all()  # a masked product of NaN is NaN
    assert o[:, at:].isnan().all()
    assert state.isnan().all()


@pytest.mark.parametrize("backend", FAST)
def test_only_the_asked_for_gradients_and_outputs_matter(backend):
    tensors = inputs(Problem(SOME, 16, 16, seed=8), torch.float32)
    for wanted in ("v", "beta", "log_decay", "initial_state"):
        grads = []
        for name, cast in ((backend, torch.Tensor.float), ("reference", torch.Tensor.double)):
            leaves = {n: cast(x).requires_grad_(n == wanted) for n, x in tensors.items()}
            _, state = delta_rule(**leaves, output_final_state=True, backend=name)
            grads.append(torch.autograd.grad(state.square().sum(), leaves[wanted], materialize_grads=True)[0])
        assert error(*grads) <= tolerances.FLOAT32


@pytest.mark.parametrize("backend", FAST)
def test_strided_views_of_one_projection(backend):
    torch.manual_seed(0)
    projection = torch.randn(2, 33, 3 * 4 * 16)
    q, k, v = (x.unflatten(-1, (4, 16)) for x in projection.chunk(3, dim=-1))
    k = k / 4
    beta, log_decay = torch.rand(2, 4, 33, 2).transpose(1, 2).split(1, dim=-1)
    o, _ = delta_rule(q, k, v, beta, -log_decay, backend=backend)
    contiguous = [x.contiguous() for x in (q, k, v, beta, -log_decay)]
    assert torch.equal(o, delta_rule(*contiguous, backend=backend)[0])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
def test_no_tokens_pass_the_state_through(inclusive, backend):
    tensors = inputs(Problem(0, 16, 8, B=2, H=4), torch.float32)
    o, state = delta_rule(**tensors, output_final_state=True, inclusive=inclusive, backend=backend)
    assert o.shape == (2, 0, 4, 8)
    assert torch.equal(state, tensors["initial_state"])


@pytest.mark.parametrize("backend", ALL)
def test_inputs_are_left_alone_and_the_state_is_new(backend):
    tensors = inputs(Problem(5, 16, 16), torch.float32)
    before = {name: x.clone() for name, x in tensors.items()}
    _, state = delta_rule(**tensors, output_final_state=True, backend=backend)
    state.zero_()
    assert all(torch.equal(tensors[name], x) for name, x in before.items())


def test_auto_takes_chunked_for_float64():
    tensors = inputs(Problem(3, 8, 8))
    assert torch.equal(delta_rule(**tensors)[0], delta_rule(**tensors, backend="chunked")[0])


def test_the_state_comes_only_when_asked_for():
    tensors = inputs(Problem(3, 8, 8))
    assert delta_rule(**tensors)[1] is None
    assert delta_rule(**tensors, output_final_state=True)[1].shape == (1, 2, 8, 8)


def test_auto_takes_the_kernels_for_gpus_if_it_is_said(monkeypatch):
    from fastweights import ops

    for said, expected in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delenv("FASTWEIGHTS_TRITON", raising=False)
        if said is not None:
            monkeypatch.setenv("FASTWEIGHTS_TRITON", said)
        assert ops._asks_for_delta_kernels(256) is expected
        assert not ops._asks_for_delta_kernels(257)
    monkeypatch.setattr(ops, "suits_this_machine", lambda: True)
    assert ops._choose(ops._DELTA_RULE, "cuda", torch.float32) == "gpu"
    assert ops._choose(ops._DELTA_RULE, "cuda", torch.float32, products=True) == "chunked"
