"""What every backend of the decay rule must do: agree with the reference, and be exact where it can be."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweights.ops import decay_rule
from tests import tolerances
from tests.ops.problems import Problem, assert_close, assert_close_at_random, error, errors, inputs, options, run, truth

FAST = ("chunked", "cpu")
ALL = ("reference", *FAST)
SOME, LONG = 40, 600
"""Tokens; Triton's interpreter takes fewer."""
GATES = list(itertools.product(("none", "scalar", "vector"), repeat=2))
LENGTHS = (1, 2, 3, 7, 16, 63, 64, 65, 257, 1024)
WIDTHS = ((16, 16), (48, 64), (64, 48), (80, 128), (128, 80), (64, 64), (16, 128), (128, 16), (48, 80))


def _covering() -> list[Problem]:
    """Each length with two widths; gates, heads and the other choices take turns."""
    gates = itertools.cycle([("vector", "vector"), *GATES])
    heads = itertools.cycle([(2, 2), (4, 2), (3, 1), (1, 1)])
    strongest = itertools.cycle([0.3, 20.0, 0.02])
    flags = itertools.cycle(itertools.product((True, False), repeat=2))
    problems = []
    for i, (T, j) in enumerate(itertools.product(LENGTHS, range(2))):
        K, V = WIDTHS[i % len(WIDTHS)] if T < 1024 else ((64, 64), (16, 48))[j]
        (key_gate, value_gate), (H, G), (initial_state, inclusive) = next(gates), next(heads), next(flags)
        problems.append(
            Problem(T, K, V, 2 if T < 100 else 1, H, G, key_gate, value_gate, next(strongest), initial_state, inclusive)
        )
    return problems


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("problem", _covering(), ids=str)
def test_agrees_with_the_reference_at_any_length_and_width(problem, backend):
    results = run(inputs(problem, torch.float32), backend, **options(problem))
    assert_close(results, truth(problem, torch.float32), tolerances.FLOAT32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("strongest", [0.3, 20.0])
@pytest.mark.parametrize("gates", GATES, ids="-".join)
def test_agrees_with_the_reference_for_any_gates(gates, strongest, inclusive, backend):
    problem = Problem(37, 16, 20, 1, 4, 2, *gates, strongest, True, inclusive, seed=1)
    results = run(inputs(problem, torch.float32), backend, **options(problem))
    assert_close(results, truth(problem, torch.float32), tolerances.FLOAT32)


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
    o, final_state = decay_rule(**tensors, **options(problem), backend=backend)
    state = tensors.pop("initial_state")
    alone = {"scale": problem.scale, "output_final_state": True, "backend": backend}
    for n, (start, end) in enumerate([(0, 11), (11, 30)]):
        part = {name: x[:, start:end] for name, x in tensors.items()}
        o_n, state_n = decay_rule(**part, **alone, initial_state=state[n : n + 1])
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
    assert results["o"].dtype == results["dq"].dtype == results["dkey_log_decay"].dtype == dtype
    assert results["final_state"].dtype == results["dinitial_state"].dtype == torch.float32
    state_error = errors(results, expected)["final_state"]
    assert state_error <= tolerances.FLOAT32
    assert_close(results, expected, tolerance)


def test_numbers_that_cancel_have_the_rounding_of_their_terms():
    """The key's gradient is a single number here, 0.0045 of terms of about 1; found by the test after this one."""
    problem = Problem(1, 1, 29, 1, 1, 1, "none", "none", 0.01, False, False, (0, 0, 0, 1), seed=23)
    for backend in FAST:
        results = run(inputs(problem, torch.float32), backend, **options(problem))
        assert_close_at_random(results, truth(problem, torch.float32), tolerances.FLOAT32)
        with pytest.raises(AssertionError):
            assert_close_at_random({**results, "dk": results["dk"] + 1e-3}, truth(problem), tolerances.FLOAT32)


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
        draw(st.sampled_from(["none", "scalar", "vector"])),
        draw(st.sampled_from(["none", "scalar", "vector"])),
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
    whole, final_state = decay_rule(**tensors, **kwargs)
    state = tensors.pop("initial_state")
    for cut in (0, 1, 15, 16, 17, 33, 64, 74, 75):
        first = {name: x[:, :cut] for name, x in tensors.items()}
        second = {name: x[:, cut:] for name, x in tensors.items()}
        o_first, carried = decay_rule(**first, **kwargs, initial_state=state)
        o_second, state_after = decay_rule(**second, **kwargs, initial_state=carried)
        o = torch.cat([o_first, o_second], dim=1)
        assert error(o, whole) <= tolerances.FLOAT32
        assert error(state_after, final_state) <= tolerances.FLOAT32


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("gates", [("vector", "vector"), ("scalar", "none"), ("none", "none")], ids="-".join)
@pytest.mark.parametrize("inclusive", [True, False])
def test_a_future_token_changes_no_bit_of_an_earlier_output(inclusive, gates, backend):
    problem = Problem(70, 16, 16, 1, 2, 1, *gates, inclusive=inclusive, seed=4)
    tensors, kwargs = inputs(problem, torch.float32), options(problem) | {"backend": backend}
    o, _ = decay_rule(**tensors, **kwargs)
    for t in (0, 1, 8, 15, 16, 31, 40, 63, 64, 69):
        changed = {name: x if x is None else x.clone() for name, x in tensors.items()}
        for name in ("q", "k", "v"):
            changed[name][:, t] = 100 * torch.randn_like(changed[name][:, t])
        for name in ("key_log_decay", "value_log_decay"):
            if changed[name] is not None:
                changed[name][:, t] = -9.0
        after, _ = decay_rule(**changed, **kwargs)
        assert torch.equal(after[:, :t], o[:, :t])
        assert not torch.equal(after[:, t:], o[:, t:])


@pytest.mark.parametrize("backend", ALL)
def test_masked_tokens_leave_the_state_bit_for_bit(backend):
    tensors = inputs(Problem(70, 16, 20, B=2, seed=5), torch.float32)
    for name in ("k", "v", "key_log_decay", "value_log_decay"):
        tensors[name].zero_()
    _, final_state = decay_rule(**tensors, output_final_state=True, backend=backend)
    assert torch.equal(final_state, tensors["initial_state"])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("inclusive", [True, False])
def test_padding_changes_no_bit_of_the_real_tokens(inclusive, backend):
    tensors = inputs(Problem(41, 16, 20, seed=6), torch.float32)
    kwargs = {"output_final_state": True, "inclusive": inclusive, "backend": backend}
    padded = torch.zeros(41, dtype=torch.bool)
    padded[[0, 1, 2, 9, 20, 21, 40]] = True
    masked, real = dict(tensors), dict(tensors)
    for name in ("q", "k", "v", "key_log_decay", "value_log_decay"):
        real[name] = tensors[name][:, ~padded]
        if name != "q":
            masked[name] = tensors[name].clone()
            masked[name][:, padded] = 0.0
    o, state = decay_rule(**masked, **kwargs)
    o_real, state_real = decay_rule(**real, **kwargs)
    assert torch.equal(o[:, ~padded], o_real)
    assert torch.equal(state, state_real)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("gates", [("vector", "vector"), ("scalar", "none"), ("scalar", "scalar")], ids="-".join)
def test_a_gate_of_zero_forgets_all_and_makes_no_nan(gates, inclusive, backend):
    problem = Problem(70, 16, 16, 1, 2, 1, *gates, inclusive=inclusive, seed=7)
    tensors = inputs(problem, torch.float32)
    for name, times in (("key_log_decay", [0, 5, 16, 40, 64]), ("value_log_decay", [7, 40, 63])):
        if tensors[name] is not None:
            tensors[name][:, times] = -torch.inf
    results = run(tensors, backend, **options(problem))
    expected = run({n: x if x is None else x.double() for n, x in tensors.items()}, "reference", **options(problem))
    assert all(x.isfinite().all() for x in results.values())
    assert_close(results, expected, tolerances.FLOAT32)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("at", [0, 12])
@pytest.mark.parametrize("name", ["v", "key_log_decay", "value_log_decay"])
def test_nan_reaches_the_outputs_after_it(name, at, backend):
    tensors = inputs(Problem(20, 16, 16, H=1, G=1), torch.float32)
    for gate in ("key_log_decay", "value_log_decay"):
        tensors[gate][:, :at] = 0.0
    tensors[name][:, at] = torch.nan
    o, state = decay_rule(**tensors, output_final_state=True, backend=backend)
    assert backend == "chunked" or o[:, :at].isfinite().all()  # a masked product of NaN is NaN
    assert o[:, at:].isnan().all()
    assert state.isnan().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("strongest", [0.05, 3.0])
def test_large_numbers_do_not_overflow_on_the_way(strongest, backend):
    problem = Problem(LONG, 16, 16, H=2, G=2, strongest=strongest, seed=3)
    tensors = inputs(problem, torch.float32)
    for name in ("k", "v"):
        tensors[name] *= 1e12
    o, state = decay_rule(**tensors, **options(problem), backend=backend)
    doubles = {name: x.double() for name, x in tensors.items()}
    expected, expected_state = decay_rule(**doubles, **options(problem), backend="reference")
    assert error(o, expected) <= tolerances.FLOAT32
    assert error(state, expected_state) <= tolerances.FLOAT32


@pytest.mark.parametrize("backend", FAST)
def test_only_the_asked_for_gradients_and_outputs_matter(backend):
    problem = Problem(SOME, 16, 16, seed=8)
    tensors = inputs(problem, torch.float32)
    for wanted in ("v", "value_log_decay", "initial_state"):
        grads = []
        for name, cast in ((backend, torch.Tensor.float), ("reference", torch.Tensor.double)):
            leaves = {n: cast(x).requires_grad_(n == wanted) for n, x in tensors.items()}
            _, state = decay_rule(**leaves, output_final_state=True, backend=name)
            grads.append(torch.autograd.grad(state.square().sum(), leaves[wanted], materialize_grads=True)[0])
        assert error(*grads) <= tolerances.FLOAT32


@pytest.mark.parametrize("backend", FAST)
def test_strided_views_of_one_projection(backend):
    torch.manual_seed(0)
    projection = torch.randn(2, 33, 3 * 4 * 16)
    q, k, v = (x.unflatten(-1, (4, 16)) for x in projection.chunk(3, dim=-1))
    f = -torch.rand(2, 4, 33, 16).transpose(1, 2)
    z = -torch.rand(2, 33, 16, 4).transpose(2, 3)
    o, _ = decay_rule(q, k, v, f, z, backend=backend)
    contiguous = [x.contiguous() for x in (q, k, v, f, z)]
    assert torch.equal(o, decay_rule(*contiguous, backend=backend)[0])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
def test_no_tokens_pass_the_state_through(inclusive, backend):
    tensors = inputs(Problem(0, 16, 8, B=2, H=4), torch.float32)
    o, state = decay_rule(**tensors, output_final_state=True, inclusive=inclusive, backend=backend)
    assert o.shape == (2, 0, 4, 8)
    assert torch.equal(state, tensors["initial_state"])


@pytest.mark.parametrize("backend", ALL)
def test_inputs_are_left_alone_and_the_state_is_new(backend):
    tensors = inputs(Problem(5, 16, 16), torch.float32)
    before = {name: x.clone() for name, x in tensors.items()}
    _, state = decay_rule(**tensors, output_final_state=True, backend=backend)
    state.zero_()
    assert all(torch.equal(tensors[name], x) for name, x in before.items())


def test_auto_takes_cpu_and_says_so_once(caplog):
    from fastweights import ops

    ops._log_choice.cache_clear()
    tensors = inputs(Problem(3, 8, 8), torch.float32)
    with caplog.at_level("INFO", logger="fastweights"):
        results = [decay_rule(**tensors)[0] for _ in range(2)]
    assert torch.equal(results[0], decay_rule(**tensors, backend="cpu")[0])
    assert [r.getMessage() for r in caplog.records if "auto" in r.getMessage()] == [
        "backend='auto' takes 'cpu' for torch.float32 tensors on cpu"
    ]


def test_auto_takes_chunked_for_float64():
    tensors = inputs(Problem(3, 8, 8))
    assert torch.equal(decay_rule(**tensors)[0], decay_rule(**tensors, backend="chunked")[0])


def test_auto_takes_the_kernels_on_gpus_that_have_them(monkeypatch):
    from fastweights import ops

    monkeypatch.delenv("FASTWEIGHTS_TRITON", raising=False)
    for suits, expected in ((False, "chunked"), (True, "gpu")):
        monkeypatch.setattr(ops, "suits_this_machine", lambda suits=suits: suits)
        assert ops._choose(ops._DECAY_RULE, "cuda", torch.float32) == expected
    assert ops._choose(ops._DECAY_RULE, "cuda", torch.float64) == "chunked"
    assert ops._choose(ops._DECAY_RULE, "cuda", torch.float32, products=True) == "chunked"
    assert ops._choose(ops._DECAY_RULE, "cpu", torch.float32) == "cpu"
    monkeypatch.setenv("FASTWEIGHTS_TRITON", "0")
    assert ops._choose(ops._DECAY_RULE, "cuda", torch.float32) == "chunked"


def test_a_program_that_is_compiled_goes_by_what_was_found_before(monkeypatch):
    from fastweights.ops.triton import calls

    for found, expected in ((None, True), (True, True), (False, False)):
        monkeypatch.setattr(calls, "_suits", found)
        assert (
            torch.compile(lambda x: x + calls.suits_this_machine(), backend="eager")(torch.zeros(1)).item() == expected
        )
        torch.compiler.reset()


def test_the_state_comes_only_when_asked_for():
    tensors = inputs(Problem(3, 8, 8), torch.float32)
    assert decay_rule(**tensors)[1] is None
    assert decay_rule(**tensors, output_final_state=True)[1].shape == (1, 2, 8, 8)
