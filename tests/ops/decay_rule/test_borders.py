"""A log gate of -inf is the border of a document: nothing before it is left, in outputs, state and gradients."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from fastweights.ops import decay_rule
from tests import tolerances
from tests.ops.problems import Problem, assert_close, inputs, run

ALL = ("reference", "chunked", "cpu")
GATES = [("vector", "vector"), ("vector", "none"), ("scalar", "none"), ("scalar", "vector"), ("none", "scalar")]
GATES += [("scalar", "scalar"), ("none", "vector")]
BORDERS = [(1,), (0,), (0, 7, 8, 9, 40), (15, 16, 17, 64), (16, 80), (99,), (98, 99), (64,)]
T = 100
OPTIONS = {"scale": 0.7, "output_final_state": True}


def _gate(problem: Problem) -> str:
    """The argument that says where documents end: on the key side, if there are gates."""
    return "value_log_decay" if problem.key_gate == "none" else "key_log_decay"


def _with_borders(problem: Problem, borders: tuple[int, ...]) -> dict[str, torch.Tensor | None]:
    tensors = inputs(problem, torch.float32)
    tensors[_gate(problem)][:, list(borders)] = -torch.inf
    return tensors


def _documents(borders: tuple[int, ...]) -> list[tuple[int, int]]:
    bounds = sorted({0, *borders, T})
    return list(itertools.pairwise(bounds))


def _of_separate_runs(problem: Problem, tensors: dict, borders: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Outputs, state and gradients of the reference in float64, each document read by itself.

    An exclusive read at a border is of the state before it, so it belongs to the document before.
    """
    leaves = {n: None if x is None else x.detach().double().requires_grad_() for n, x in tensors.items()}
    outputs, state = [], leaves["initial_state"]
    for start, end in _documents(borders):
        part = {n: None if x is None else x[:, start:end] for n, x in leaves.items() if n != "initial_state"}
        before = state
        if start in borders:
            state = torch.zeros_like(state)
            gate = part[_gate(problem)]
            part[_gate(problem)] = torch.cat([torch.zeros_like(gate[:, :1]), gate[:, 1:]], dim=1)
        options = {**OPTIONS, "inclusive": problem.inclusive, "backend": "reference"}
        o, after = decay_rule(**part, initial_state=state, **options)
        if start in borders and not problem.inclusive:
            q = {name: x if x is None else x[:, :1] for name, x in part.items()}
            first, _ = decay_rule(**q, initial_state=before, **options)
            o = torch.cat([first, o[:, 1:]], dim=1)
        outputs.append(o)
        state = after
    return _results(leaves, torch.cat(outputs, dim=1), state)


@cache
def _truth(borders: tuple[int, ...], gates: tuple[str, str], inclusive: bool) -> dict[str, torch.Tensor]:
    """For all backends."""
    problem = _problem(gates, inclusive)
    return _of_separate_runs(problem, _with_borders(problem, borders), borders)


def _problem(gates: tuple[str, str], inclusive: bool) -> Problem:
    return Problem(T, 16, 12, 2, 4, 2, *gates, inclusive=inclusive, seed=9)


def _results(leaves: dict, o: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).double() for i, x in enumerate((o, state))
    ]
    loss = sum((x.double() * w).sum() for x, w in zip((o, state), weights, strict=True))
    given = {n: x for n, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(loss, list(given.values()), materialize_grads=True)
    return {"o": o.detach(), "final_state": state.detach()} | {
        f"d{n}": grad for n, grad in zip(given, grads, strict=True)
    }


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("gates", GATES, ids="-".join)
@pytest.mark.parametrize("borders", BORDERS, ids=str)
def test_a_border_is_a_new_sequence(borders, gates, inclusive, backend):
    problem = _problem(gates, inclusive)
    tensors = _with_borders(problem, borders)
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in tensors.items()}
    o, state = decay_rule(**leaves, **OPTIONS, inclusive=inclusive, backend=backend)
    results = _results(leaves, o, state)
    assert all(x.isfinite().all() for x in results.values())
    assert not results[f"d{_gate(problem)}"][:, list(borders)].any()
    assert_close(results, _truth(borders, gates, inclusive), tolerances.FLOAT32)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("gates", GATES, ids="-".join)
@pytest.mark.parametrize("border", [1, 16, 37, 64, 99])
def test_what_came_before_a_border_changes_no_bit_after_it(border, gates, inclusive, backend):
    problem = Problem(T, 16, 12, 1, 4, 2, *gates, inclusive=inclusive, seed=10)
    first = border if inclusive else border + 1  # an exclusive read at the border is of the state before it
    results = []
    for seed in (None, 1):
        tensors = _with_borders(problem, (border,))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for name in ("q", "k", "v"):
                x = tensors[name][:, :border]
                x.copy_(100 * torch.randn(x.shape, generator=generator))
            tensors["initial_state"] *= 1000
        results.append(decay_rule(**tensors, **OPTIONS, inclusive=inclusive, backend=backend))
    (o, state), (other, other_state) = results
    assert torch.equal(o[:, first:], other[:, first:])
    assert torch.equal(state, other_state)


@pytest.mark.parametrize("backend", ALL)
def test_no_gradient_crosses_a_border(backend):
    problem = Problem(T, 16, 12, seed=11)
    tensors = _with_borders(problem, (T // 2,))
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    o, state = decay_rule(**leaves, **OPTIONS, backend=backend)
    loss = o[:, T // 2 :].square().sum() + state.square().sum()
    *grads, dinitial = torch.autograd.grad(loss, list(leaves.values()))
    assert not dinitial.any()
    assert all(not x[:, : T // 2].any() and x[:, T // 2 + 1 :].any() for x in grads)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
def test_single_channels_may_forget(inclusive, backend):
    problem = Problem(T, 16, 12, inclusive=inclusive, seed=12)
    tensors = inputs(problem, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name in ("key_log_decay", "value_log_decay"):
        tensors[name][torch.rand(tensors[name].shape, generator=generator) < 0.05] = -torch.inf
    doubles = {n: x.double() for n, x in tensors.items()}
    results = run(tensors, backend, **OPTIONS, inclusive=inclusive)
    assert all(x.isfinite().all() for x in results.values())
    assert_close(results, run(doubles, "reference", **OPTIONS, inclusive=inclusive), tolerances.FLOAT32)
