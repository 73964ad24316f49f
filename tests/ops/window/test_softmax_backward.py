"""The softmax between the products of a window's backward pass, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from fastweights.ops import window
from fastweights.ops.numba.scratch import guarded
from fastweights.ops.window import Sums, softmax_backward_
from tests import tolerances

# Blocks, key/value heads, heads that share a key, queries of a block, keys before them, window.
CASES = [
    (1, 1, 1, 16, 0, 1),
    (1, 1, 1, 32, 16, 1),
    (3, 2, 3, 16, 48, 41),
    (2, 3, 1, 8, 40, 40),
    (2, 1, 2, 64, 1024, 1000),
]
SCALE = 0.3


def problem(case, dtype) -> tuple[torch.Tensor, torch.Tensor, Sums, torch.Tensor, torch.Tensor]:
    """Logits, derivatives, sums, places of queries, and what each query sees."""
    N, G, R, C, before, reach = case
    torch.manual_seed(0)
    logits, derivatives = torch.randn(2, N * G, R * C, before + C, dtype=dtype).unbind()
    index = torch.arange(N * C).view(N, C).contiguous()
    index[-1, :3] = -1
    distance = torch.arange(C)[:, None] + before - torch.arange(before + C)
    seen = (distance >= 0) & (distance <= index[..., None].clamp(max=reach - 1))
    seen = seen[:, None, None].expand(-1, G, R, -1, -1).reshape(logits.shape)
    log_sums = (logits.double() * SCALE).masked_fill(~seen, -torch.inf).logsumexp(-1)
    sums = Sums(log_sums.float(), torch.rand(N * G, R * C), torch.randn(N * G, R * C))
    return logits, derivatives, sums, index, seen


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_derivatives(monkeypatch, dtype, case, threads):
    logits, derivatives, sums, index, seen = problem(case, dtype)
    weights = (logits.double() * SCALE).masked_fill(~seen, -1e300).softmax(-1) * seen * sums.share[..., None]
    product = sums.product + (weights * derivatives).sum(-1)
    of_logits = weights * (derivatives - product[..., None]) * SCALE
    monkeypatch.setattr(window, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with guarded():
        softmax_backward_(logits, derivatives, sums, index, heads=case[1], window=case[5], scale=SCALE)
    tolerance = tolerances.FLOAT32 if dtype == torch.float32 else tolerances.BFLOAT16
    for found, true in ((logits, weights), (derivatives, of_logits), (sums.product, product)):
        assert (found - true).abs().max() <= tolerance * true.abs().max().clamp(min=1e-3)
        assert found.dim() == 2 or found[~seen].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_seen_may_be_anything(dtype):
    """NaN and infinity beside what a query sees do not come near it."""
    case = (3, 2, 3, 16, 48, 41)
    logits, derivatives, sums, index, seen = problem(case, dtype)
    expected = [x.clone() for x in (logits, derivatives)]
    softmax_backward_(*expected, Sums(*(x.clone() for x in sums)), index, heads=2, window=41, scale=SCALE)
    for x, value in ((logits, torch.inf), (derivatives, torch.nan)):
        x[~seen] = value
    softmax_backward_(logits, derivatives, sums, index, heads=2, window=41, scale=SCALE)
    assert logits.equal(expected[0])
    assert derivatives.equal(expected[1])


def test_numbers_that_are_not_finite_stay_so():
    logits, derivatives, sums, index, _ = problem((1, 1, 1, 16, 16, 16), torch.bfloat16)
    derivatives[0, 9, 20] = torch.nan
    softmax_backward_(logits, derivatives, sums, index, heads=1, window=16, scale=SCALE)
    assert derivatives[0, 9, 20].isnan()
    assert derivatives[0, :9].isfinite().all()
