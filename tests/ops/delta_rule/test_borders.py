"""A log decay of -inf is the border of a document: nothing before it is left, in outputs, state and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastweights.ops import delta_rule
from tests import tolerances
from tests.ops.delta_rule.problems import Problem, inputs
from tests.ops.problems import assert_close, results_of

ALL = ("reference", "chunked", "cpu")
BORDERS = [(1,), (0,), (0, 7, 8, 9, 40), (15, 16, 17, 64), (16, 80), (99,), (98, 99), (64,)]
T = 100
OPTIONS = {"scale": 0.7, "output_final_state": True}


def _with_borders(problem: Problem, borders: tuple[int, ...]) -> dict[str, torch.Tensor]:
    tensors = inputs(problem, torch.float32)
    tensors["log_decay"][:, list(borders)] = -torch.inf
    return tensors


def _of_separate_runs(problem: Problem, tensors: dict, borders: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Outputs, state and gradients of the reference in float64, each document read by itself.

    An exclusive read at a border is of the state before it, so it belongs to the document before.
    """
    leaves = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    outputs, state = [], leaves["initial_state"]
    options = {**OPTIONS, "inclusive": problem.inclusive, "backend": "reference"}
    for start, end in itertools.pairwise(sorted({0, *borders, T})):
        part = {n: x[:, start:end] for n, x in leaves.items() if n != "initial_state"}
        before = state
        if start in borders:
            state = torch.zeros_like(state)
            part["log_decay"] = torch.nn.functional.pad(part["log_decay"][:, 1:], (0, 0, 0, 0, 1, 0))
        o, after = delta_rule(**part, initial_state=state, **options)
        if start in borders and not problem.inclusive:
            first, _ = delta_rule(**{n: x[:, :1] for n, x in part.items()}, initial_state=before, **options)
            o = torch.cat([first, o[:, 1:]], dim=1)
        outputs.append(o)
        state = after
    return results_of(leaves, torch.cat(outputs, dim=1), state)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("borders", BORDERS, ids=str)
def test_a_border_is_a_new_sequence(borders, inclusive, backend):
    problem = Problem(T, 16, 12, 2, 4, 2, inclusive=inclusive, seed=9)
    tensors = _with_borders(problem, borders)
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    results = results_of(leaves, *delta_rule(**leaves, **OPTIONS, inclusive=inclusive, backend=backend))
    assert all(x.isfinite().all() for x in results.values())
    assert not results["dlog_decay"][:, list(borders)].any()
    assert_close(results, _of_separate_runs(problem, tensors, borders), tolerances.FLOAT32)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("border", [1, 16, 37, 64, 99])
def test_what_came_before_a_border_changes_no_bit_after_it(border, inclusive, backend):
    problem = Problem(T, 16, 12, 1, 4, 2, inclusive=inclusive, seed=10)
    first = border if inclusive else border + 1  # an exclusive read at the border is of the state before it
    results = []
    for changed in (False, True):
        tensors = _with_borders(problem, (border,))
        if changed:
            for name in ("q", "v", "initial_state"):
                tensors[name][:, : border if name != "initial_state" else None] *= 1000
            tensors["k"][:, :border] = tensors["k"][:, :border].flip(-1)
        results.append(delta_rule(**tensors, **OPTIONS, inclusive=inclusive, backend=backend))
    (o, state), (other, other_state) = results
    assert not torch.equal(o[:, :first], other[:, :first])
    assert torch.equal(o[:, first:], other[:, first:])
    assert torch.equal(state, other_state)


@pytest.mark.parametrize("backend", ALL)
def test_no_gradient_crosses_a_border(backend):
    tensors = _with_borders(Problem(T, 16, 12, seed=11), (T // 2,))
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    o, state = delta_rule(**leaves, **OPTIONS, backend=backend)
    loss = o[:, T // 2 :].square().sum() + state.square().sum()
    *grads, dinitial = torch.autograd.grad(loss, list(leaves.values()))
    assert not dinitial.any()
    assert all(not x[:, : T // 2].any() and x[:, T // 2 + 1 :].any() for x in grads)
