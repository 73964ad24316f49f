"""The reference is the definition: checked against the formula by hand, and its gradients numerically."""

from __future__ import annotations

import pytest
import torch

from fastweights.ops import delta_rule
from tests.ops.delta_rule.problems import NAMES, Problem, inputs
from tests.ops.problems import options


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_formula(decay, inclusive):
    p = Problem(4, 3, 2, 1, 4, 2, decay, inclusive=inclusive)
    x = inputs(p)
    o, final_state = delta_rule(**x, **options(p), backend="reference")
    for h in range(4):
        g = h // 2
        S = x["initial_state"][0, g]
        for t in range(4):
            k, v, beta = x["k"][0, t, g], x["v"][0, t, g], x["beta"][0, t, g]
            decayed = S * x["log_decay"][0, t, g].exp() if decay else S
            after = decayed + beta * torch.outer(k, v - decayed.T @ k)
            read = after if inclusive else S
            torch.testing.assert_close(o[0, t, h], p.scale * read.T @ x["q"][0, t, h])
            S = after
        torch.testing.assert_close(final_state[0, g], S)


def test_a_full_write_replaces_what_a_key_gave():
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 2, 1, 8)
    v = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    o, _ = delta_rule(k, k, v, torch.ones(1, 2, 1, 1), backend="reference")
    torch.testing.assert_close(o, v)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_gradients(decay, inclusive):
    torch.autograd.gradcheck(*_rule_and_values(Problem(5, 3, 2, 1, 4, 2, decay, inclusive=inclusive)))


def test_second_derivatives():
    torch.autograd.gradgradcheck(*_rule_and_values(Problem(4, 2, 3)), fast_mode=True)


def test_autocast_does_not_touch_it():
    tensors = inputs(Problem(9, 8, 8), torch.float32)
    o, _ = delta_rule(**tensors, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(o, delta_rule(**tensors, backend="reference")[0])


def _rule_and_values(problem: Problem):
    tensors = inputs(problem)
    names = [name for name in NAMES if tensors[name] is not None]

    def rule(*values):
        return delta_rule(**dict(zip(names, values, strict=True)), **options(problem), backend="reference")

    return rule, [tensors[name].requires_grad_() for name in names]
