"""The reference is the definition: checked against the formula by hand, and its gradients numerically."""

from __future__ import annotations

import pytest
import torch

from fastweights.ops import decay_rule
from tests.ops.problems import NAMES, Problem, inputs, options


@pytest.mark.parametrize("inclusive", [True, False])
def test_formula(inclusive):
    p = Problem(4, 3, 2, 1, 4, 2, inclusive=inclusive)
    x = inputs(p)
    o, final_state = decay_rule(**x, **options(p), backend="reference")
    for h in range(4):
        g = h // 2
        S = x["initial_state"][0, g]
        for t in range(4):
            f, z = x["key_log_decay"][0, t, g].exp(), x["value_log_decay"][0, t, g].exp()
            after = torch.outer(f, z) * S + torch.outer(x["k"][0, t, g], x["v"][0, t, g])
            read = after if inclusive else S
            torch.testing.assert_close(o[0, t, h], p.scale * read.T @ x["q"][0, t, h])
            S = after
        torch.testing.assert_close(final_state[0, g], S)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("gates", [("vector", "vector"), ("scalar", "none"), ("none", "scalar")], ids="-".join)
def test_gradients(gates, inclusive):
    problem = Problem(5, 3, 2, 1, 4, 2, *gates, inclusive=inclusive)
    tensors = inputs(problem)
    names = [name for name in NAMES if tensors[name] is not None]

    def rule(*values):
        return decay_rule(**dict(zip(names, values, strict=True)), **options(problem), backend="reference")

    torch.autograd.gradcheck(rule, [tensors[name].requires_grad_() for name in names])


def test_autocast_does_not_touch_it():
    problem = Problem(9, 8, 8)
    tensors = inputs(problem, torch.float32)
    o, _ = decay_rule(**tensors, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(o, decay_rule(**tensors, backend="reference")[0])
