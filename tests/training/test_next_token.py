"""Losses over next tokens, of logits and of hidden states."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from fastweights.layers.distributions import AtOnce
from fastweights.models.quantisation import quantise
from fastweights.training.next_token import Targets, divergence, next_token_loss, read_out_loss
from tests import tolerances
from tests.conftest import make_llama, random_ids
from tests.ops.problems import error

VOCABULARY = 40


def test_divergence_is_zero_for_the_teacher_itself_and_positive_otherwise():
    teacher, student = torch.randn(2, 2, 5, 7)
    assert divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert divergence(student, teacher).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("elements", [1, 20, 1 << 20])
def test_divergence_has_the_gradient_of_its_definition(monkeypatch, elements):
    """However many rows are done at once."""
    monkeypatch.setattr("fastweights.layers.distributions.ON_CPU", AtOnce(1, elements))
    student, teacher = torch.randn(2, 2, 5, 7)
    student.requires_grad_()
    truth = kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum") / 10
    expected, found = (torch.autograd.grad(3 * x, student)[0] for x in (truth, divergence(student, teacher)))
    assert error(found, expected) <= tolerances.FLOAT32


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


@pytest.mark.parametrize(("rows", "elements"), [(1, 1), (7, 3 * VOCABULARY), (100, 1 << 20)])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_loss_of_hidden_states_is_that_of_their_logits(monkeypatch, rows, elements, kl_weight):
    """With all derivatives, however many rows are done at once."""
    monkeypatch.setattr("fastweights.layers.distributions.ON_CPU", AtOnce(rows, elements))
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


@pytest.mark.parametrize("kind", ["plain", "hooked", "trained beside"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_among_some_tokens_the_others_are_none(monkeypatch, kl_weight, kind):
    """As if both unembeddings had no other rows, whatever they are made of."""
    monkeypatch.setattr("fastweights.layers.distributions.ON_CPU", AtOnce(7, 60))
    hidden, head, labels, states, teacher_head = problem()
    vocabulary = torch.tensor([0, 3, 4, 11, 12, 25, 38, 39])
    places = torch.full((VOCABULARY + 100,), -100)
    places[vocabulary] = torch.arange(len(vocabulary))
    small, small_teacher = (nn.Linear(layer.in_features, len(vocabulary)) for layer in (head, teacher_head))
    small.weight.data, small_teacher.weight.data = head.weight.data[vocabulary], teacher_head.weight.data[vocabulary]
    small.bias.data, small_teacher.bias.data = head.bias.data[vocabulary], torch.zeros(len(vocabulary))
    expected = defined(hidden, small, places[labels], states, small_teacher, kl_weight)
    given = head if kind != "trained beside" else nn.Sequential(head)
    calls = []
    if kind == "hooked":
        given.register_forward_hook(lambda *_: calls.append(1))
    found = read_out_loss(
        hidden, given, Targets(labels, states), teacher_head=teacher_head, kl_weight=kl_weight, vocabulary=vocabulary
    )
    assert len(calls) == (3 if kind == "hooked" else 0)
    assert error(found, expected) <= tolerances.FLOAT32
    mine = torch.autograd.grad(3 * found, (hidden, head.weight, head.bias))
    truth = torch.autograd.grad(3 * expected, (hidden, small.weight, small.bias))
    assert error(mine[0], truth[0]) <= tolerances.FLOAT32
    for of_all, of_some in zip(mine[1:], truth[1:], strict=True):
        assert error(of_all[vocabulary], of_some) <= tolerances.FLOAT32
        assert of_all.count_nonzero() == of_all[vocabulary].count_nonzero()


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


def test_where_no_gradient_is_wanted_none_is_made(monkeypatch):
    hidden, head, labels, states, teacher_head = problem()
    expected = read_out_loss(hidden, head, Targets(labels, states), teacher_head=teacher_head, kl_weight=0.3)
    monkeypatch.setattr("torch.autograd.grad", None)
    with torch.no_grad():
        found = read_out_loss(hidden, head, Targets(labels, states), teacher_head=teacher_head, kl_weight=0.3)
    assert not found.requires_grad
    assert found == expected


def test_an_unembedding_of_any_kind_is_asked_itself():
    """As one with LoRA beside it is."""
    hidden, head, labels, *_ = problem()
    beside = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, VOCABULARY))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.beside = head.requires_grad_(False), beside

        def forward(self, x):
            return (self.head(x) + self.beside(x)).tanh()

    both = Both()
    found, expected = read_out_loss(hidden, both, Targets(labels)), next_token_loss(both(hidden), labels)
    assert error(found, expected) <= tolerances.FLOAT32
    wanted = (hidden, *beside.parameters())
    for mine, truth in zip(*(torch.autograd.grad(loss, wanted) for loss in (found, expected)), strict=True):
        assert error(mine, truth) <= tolerances.FLOAT32


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_teacher_in_few_bits(weights):
    teacher = quantise(make_llama(hidden_size=64), weights)
    ids, hidden, head = random_ids(1, 8), torch.randn(1, 8, 16), nn.Linear(16, 257)
    states = teacher.base_model(input_ids=ids).last_hidden_state
    unembedding = teacher.get_output_embeddings()
    found = read_out_loss(hidden, head, Targets(ids, states), teacher_head=unembedding, kl_weight=1.0)
    assert error(found, divergence(head(hidden), teacher(input_ids=ids).logits)) <= 1e-2


def test_float16_holds_the_derivative_of_many_tokens():
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, VOCABULARY), torch.full((1, 4096, 8), 30.0, requires_grad=True)
    labels = torch.full((1, 4096), 3)
    with torch.autocast("cpu", torch.float16):
        loss = read_out_loss(hidden, head, Targets(labels))
    found = torch.autograd.grad(loss, (hidden, head.weight))
    expected = torch.autograd.grad(next_token_loss(head(hidden), labels), (hidden, head.weight))
    for mine, truth in zip(found, expected, strict=True):
        assert error(mine, truth) <= 2e-2


def test_a_token_that_cannot_be_is_no_matter_where_nothing_counts():
    hidden, head, labels, *_ = problem()
    head.bias.data[0] = -torch.inf
    loss = read_out_loss(hidden, head, Targets(labels.clamp(min=1).where(labels != -100, -100)))
    assert loss.isfinite()


def test_labels_that_are_none_are_refused():
    hidden, head, labels, *_ = problem()
    labels[0, 5] = -1
    with pytest.raises((IndexError, RuntimeError), match="labels are from -1 to 33"):
        read_out_loss(hidden, head, Targets(labels))


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
