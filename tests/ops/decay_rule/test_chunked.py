"""What is particular to the chunked backend: numerical gradients, memory, torch's ways of running it."""

from __future__ import annotations

import pytest
import torch

from fastweights.ops import decay_rule
from tests import tolerances
from tests.ops.problems import NAMES, Problem, assert_close, inputs, options, run, truth


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("gates", [("vector", "vector"), ("scalar", "none"), ("none", "scalar")], ids="-".join)
def test_gradients(gates, inclusive):
    # 18 tokens are two sub-chunks; 66, in the fast mode below, two chunks.
    problem = Problem(18, 2, 2, 1, 2, 1, *gates, inclusive=inclusive)
    torch.autograd.gradcheck(*_rule_and_values(problem))


@pytest.mark.parametrize("cu_seqlens", [None, (0, 17, 66)], ids=str)
def test_gradients_across_chunks(cu_seqlens):
    torch.autograd.gradcheck(*_rule_and_values(Problem(66, 2, 3, cu_seqlens=cu_seqlens)), fast_mode=True)


def test_second_derivatives():
    torch.autograd.gradgradcheck(*_rule_and_values(Problem(18, 2, 2)), fast_mode=True)


@pytest.mark.parametrize("gates", [("vector", "vector"), ("scalar", "scalar"), ("none", "none")], ids="-".join)
def test_float64_is_exact_to_float64(gates):
    problem = Problem(130, 16, 8, 1, 2, 1, *gates, strongest=20.0)
    results = run(inputs(problem), "chunked", **options(problem))
    assert_close(results, truth(problem), 1e-6 * tolerances.FLOAT32)


def test_autocast_does_not_touch_it():
    problem = Problem(70, 16, 16)
    tensors = inputs(problem, torch.float32)
    grads = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, _ = decay_rule(*leaves[:5], initial_state=leaves[5], backend="chunked")
        o.square().sum().backward()
        grads.append([o, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_torch_compile():
    tensors = inputs(Problem(18, 8, 8, key_gate="scalar", value_gate="none", initial_state=False), torch.float32)
    results = []
    for rule in (decay_rule, torch.compile(decay_rule, fullgraph=True, backend="aot_eager")):
        leaves = [tensors[name].clone().requires_grad_() for name in ("q", "k", "v", "key_log_decay")]
        o, state = rule(*leaves, output_final_state=True, backend="chunked")
        (o.sum() + state.sum()).backward()
        results.append([o, state, *(x.grad for x in leaves)])
    torch.testing.assert_close(*results)


def _rule_and_values(problem: Problem):
    tensors = inputs(problem)
    names = [name for name in NAMES if tensors[name] is not None]

    def rule(*values):
        return decay_rule(**dict(zip(names, values, strict=True)), **options(problem), backend="chunked")

    return rule, [tensors[name].requires_grad_() for name in names]
