"""Losses over next tokens and their derivatives by the kernel, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from fastweights.ops import next_token
from fastweights.ops.next_token import losses_and_derivatives, takes
from fastweights.ops.numba.scratch import guarded
from tests import tolerances

SIZES = [(1, 16), (5, 17), (3, 31), (7, 32), (4, 1000), (2, 6171)]


def problem(n: int, v: int, dtype: torch.dtype, *, other: bool) -> tuple:
    torch.manual_seed(0)
    logits = (3 * torch.randn(n, v)).to(dtype)
    truth = (logits + torch.randn(n, v)).to(dtype) if other else None
    weights = torch.rand(n)
    weights[::3] = 0  # of a label that is none
    return logits, truth, torch.randint(v, (n,)), weights


def expected(logits, truth, labels, weights, kl_weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses, and the derivative of their mean."""
    x = logits.double().requires_grad_()
    total = (cross_entropy(x, labels, reduction="none") * weights).sum()
    if truth is not None:
        log_p = log_softmax(truth.double(), -1)
        total = total + kl_weight * kl_div(log_softmax(x, -1), log_p, log_target=True, reduction="sum")
    (derivatives,) = torch.autograd.grad(total / len(x), x)
    return total.detach(), derivatives


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kl_weight", [None, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "v"), SIZES)
def test_against_autograd(monkeypatch, n, v, dtype, kl_weight, threads):
    given = problem(n, v, dtype, other=kl_weight is not None)
    monkeypatch.setattr(next_token, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    before = given[0].clone()
    with guarded():
        total, derivatives = losses_and_derivatives(*given, kl_weight or 0.0)
    true_total, true_derivatives = expected(*given, kl_weight or 0.0)
    assert given[0].equal(before)
    assert derivatives.dtype == dtype
    assert abs(total - true_total) <= tolerances.FLOAT32 * true_total.clamp(min=1)
    tolerance = tolerances.FLOAT32 if dtype == torch.float32 else tolerances.BFLOAT16
    assert (derivatives - true_derivatives).abs().max() <= tolerance * true_derivatives.abs().max()


def test_models_that_agree_have_no_divergence():
    logits, _, labels, weights = problem(6, 1000, torch.float32, other=False)
    total, derivatives = losses_and_derivatives(logits, logits, labels, torch.zeros_like(weights), 1.0)
    assert abs(total) <= 1e-5
    assert derivatives.abs().max() <= 1e-8


def test_tokens_that_cannot_be():
    """A logit of -inf in both, or in the other model alone, is nothing; in the model alone it costs infinitely much."""
    logits, truth, labels, weights = problem(4, 100, torch.float32, other=True)
    labels[:] = 5
    logits[0, 9] = truth[0, 9] = truth[1, 9] = -torch.inf
    total, derivatives = losses_and_derivatives(logits, truth, labels, weights, 1.0)
    assert total.isfinite()
    assert derivatives.isfinite().all()
    assert derivatives[0, 9] == 0
    logits[2, 9] = -torch.inf
    assert losses_and_derivatives(logits, truth, labels, weights, 1.0)[0] == torch.inf


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_seen(place, value):
    given = problem(3, 40, torch.bfloat16, other=True)
    given[place][1, 39] = value
    assert not losses_and_derivatives(*given, 1.0)[0].isfinite()


def test_a_label_that_is_no_token():
    logits, truth, labels, weights = problem(3, 40, torch.float32, other=True)
    labels[1] = 40
    with pytest.raises(IndexError, match=r"labels are from \d+ to 40; allowed are 0 to 39"):
        losses_and_derivatives(logits, truth, labels, weights, 1.0)


def test_no_rows():
    total, derivatives = losses_and_derivatives(*problem(0, 40, torch.float32, other=True), 1.0)
    assert total == 0
    assert derivatives.shape == (0, 40)


def test_what_it_takes():
    logits, truth, *_ = problem(3, 40, torch.float32, other=True)
    assert takes(logits, None)
    assert takes(logits, truth)
    assert not takes(logits, truth.bfloat16())
    assert not takes(logits.double(), truth.double())
    assert not takes(logits[:, :15], truth[:, :15])
    assert takes(logits[:, ::2], truth[:, ::2])
    given = problem(3, 40, torch.float32, other=True)
    apart = [x.mT.contiguous().mT for x in given[:2]]
    assert losses_and_derivatives(*apart, *given[2:], 0.3)[1].equal(losses_and_derivatives(*given, 0.3)[1])
