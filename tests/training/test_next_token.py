"""Losses over next tokens, of logits and of hidden states."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from fastweights.training.next_token import Targets, divergence, next_token_loss, read_out_loss
from tests import tolerances
from tests.conftest import random_ids
from tests.ops.problems import error

VOCABULARY = 40


def test_divergence_is_zero_for_the_teacher_itself_and_positive_otherwise():
    teacher, student = torch.randn(2, 2, 5, 7)
    assert divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert divergence(student, teacher).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)


def problem(*, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(8, VOCABULARY, bias=bias), nn.Linear(6, VOCABULARY, bias=False)
    head.weight.data *= 3
    hidden, states = torch.randn(2, 9, 8, dtype=dtype, requires_grad=True), torch.randn(2, 9, 6, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (2, 9))
    labels[0, 3:5] = -100
    labels[1, 0] = -100
    return hidden, head.to(dtype), labels, states, teacher_head.to(dtype).requires_grad_(False)


def defined(hidden, head, labels, states, teacher_head, kl_weight):
    """By torch's own losses."""
    logits = head(hidden)
    loss = (1 - kl_weight) * cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if kl_weight:
        p = teacher_head(states).flatten(0, 1).log_softmax(-1)
        q = logits.flatten(0, 1).log_softmax(-1)
        loss = loss + kl_weight * kl_div(q, p, reduction="batchmean", log_target=True)
    return loss


@pytest.mark.parametrize("at_once", [1, 7 * VOCABULARY, 1 << 24])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_loss_of_hidden_states_is_that_of_their_logits(monkeypatch, at_once, kl_weight):
    """With all derivatives, however many rows are done at once."""
    monkeypatch.setattr("fastweights.training.next_token._LOGITS", at_once)
    monkeypatch.setattr("fastweights.training.next_token._ELEMENTS", at_once // 2)
    hidden, head, labels, states, teacher_head = problem()
    targets = Targets(labels, states if kl_weight else None)
    found = read_out_loss(hidden, head, targets, teacher_head=teacher_head if kl_weight else None, kl_weight=kl_weight)
    expected = defined(hidden, head, labels, states, teacher_head, kl_weight)
    assert error(found, expected) <= tolerances.FLOAT32
    wanted = (hidden, head.weight, head.bias)
    pairs = zip(*(torch.autograd.grad(3 * loss, wanted) for loss in (found, expected)), strict=True)
    for mine, truth in pairs:
        assert mine.dtype is truth.dtype
        assert error(mine, truth) <= tolerances.FLOAT32


def test_it_is_both_losses_of_logits():
    hidden, head, labels, states, teacher_head = problem(bias=False)
    logits, truth = head(hidden), teacher_head(states)
    for kl_weight, expected in ((0.0, next_token_loss(logits, labels)), (1.0, divergence(logits, truth))):
        found = read_out_loss(hidden, head, Targets(labels, states), teacher_head=teacher_head, kl_weight=kl_weight)
        assert error(found, expected) <= tolerances.FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_its_products_are_autocasts(dtype):
    hidden, head, labels, states, teacher_head = problem()
    expected = defined(hidden, head, labels, states, teacher_head, 1.0)
    with torch.autocast("cpu", dtype):
        found = read_out_loss(hidden, head, Targets(labels, states), teacher_head=teacher_head, kl_weight=1.0)
    assert found.dtype is torch.float32
    assert error(found, expected) <= 2e-2
    mine, truth = (torch.autograd.grad(loss, (hidden, head.weight)) for loss in (found, expected))
    for a, b in zip(mine, truth, strict=True):
        assert a.dtype is torch.float32
        assert 1e-5 < error(a, b) <= 3e-2


def test_only_what_is_trained_gets_a_derivative():
    hidden, head, labels, *_ = problem()
    head.requires_grad_(False)
    read_out_loss(hidden, head, Targets(labels)).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_of_no_labels_there_is_no_loss():
    hidden, head, labels, *_ = problem()
    loss = read_out_loss(hidden, head, Targets(torch.full_like(labels, -100)))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_a_teacher_of_any_family_says_what_its_unembedding_makes_of_its_states(family):
    ids = random_ids(2, 12)
    states = family.base_model(input_ids=ids).last_hidden_state
    assert error(family.get_output_embeddings()(states), family(input_ids=ids).logits) <= tolerances.FLOAT32
