"""What is particular to the chunked backend: numerical gradients, torch's ways of running it."""

from __future__ import annotations

import pytest
import torch

from fastweights.ops import delta_rule
from tests import tolerances
from tests.ops.delta_rule.problems import NAMES, Problem, inputs, run, truth
from tests.ops.problems import assert_close, options, results_of, same


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_gradients(decay, inclusive):
    torch.autograd.gradcheck(*_rule_and_values(Problem(9, 2, 2, 1, 2, 1, decay, inclusive=inclusive)))


@pytest.mark.parametrize("cu_seqlens", [None, (0, 17, 66)], ids=str)
def test_gradients_across_chunks(cu_seqlens):
    torch.autograd.gradcheck(*_rule_and_values(Problem(66, 2, 3, cu_seqlens=cu_seqlens)), fast_mode=True)


def test_second_derivatives():
    torch.autograd.gradgradcheck(*_rule_and_values(Problem(18, 2, 2)), fast_mode=True)


@pytest.mark.parametrize("decay", [True, False])
def test_float64_is_exact_to_float64(decay):
    problem = Problem(130, 16, 8, 1, 2, 1, decay, strongest=20.0)
    results = run(inputs(problem), "chunked", **options(problem))
    assert_close(results, truth(problem), 1e-6 * tolerances.FLOAT32)


def test_autocast_does_not_touch_it():
    tensors = inputs(Problem(70, 16, 16), torch.float32)
    results = []
    for enabled in (False, True):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = delta_rule(**leaves, output_final_state=True, backend="chunked")
        results.append(results_of(leaves, *outputs))
    assert same(*results)


def test_torch_compile():
    tensors = inputs(Problem(70, 8, 8, initial_state=False), torch.float32)
    del tensors["initial_state"]
    results = []
    for rule in (delta_rule, torch.compile(delta_rule, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        o, state = rule(*leaves, output_final_state=True, backend="chunked")
        (o.sum() + state.sum()).backward()
        results.append([o, state, *(x.grad for x in leaves)])
    torch.testing.assert_close(*results)


def _rule_and_values(problem: Problem):
    tensors = inputs(problem)
    names = [name for name in NAMES if tensors[name] is not None]

    def rule(*values):
        return delta_rule(**dict(zip(names, values, strict=True)), **options(problem), backend="chunked")

    return rule, [tensors[name].requires_grad_() for name in names]
