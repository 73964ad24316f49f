"""Losses over next tokens: cross-entropy with a text, divergence from a teacher.

`read_out_loss` makes both of hidden states, some thousand tokens' logits never being there at once: of a vocabulary of
49,152 they are 200 kB a token, and of a step of 2,048 tokens, teacher's, student's and their derivatives, gigabytes.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from fastweights.layers.distributions import at_once, pieces, token_divergences
from fastweights.layers.linear import linear
from fastweights.layers.next_token_gradient import NO_LABEL
from fastweights.ops import next_token

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeGuard

    from jaxtyping import Float, Int


def next_token_loss(logits: Float[Tensor, "B T vocabulary"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token but the first, in nats; where the label is -100, a token does not count.

    Args:
        logits: of the token after each.
        labels: the tokens themselves.
    """
    labels = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def divergence(
    student_logits: Float[Tensor, "B T vocabulary"], teacher_logits: Float[Tensor, "B T vocabulary"]
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) over all positions, in nats."""
    return token_divergences(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)).mean()


class Targets(NamedTuple):
    """What next tokens should be."""

    labels: Int[Tensor, "B T"]
    """The tokens themselves; -100 where one does not count."""
    teacher_states: Float[Tensor, "B T D"] | None = None
    """The teacher's last hidden states, those that its unembedding reads."""


def read_out_loss(
    hidden: Float[Tensor, "B T d"],
    head: nn.Module,
    targets: Targets,
    *,
    teacher_head: nn.Module | None = None,
    kl_weight: float = 0.0,
    vocabulary: Int[Tensor, " v"] | None = None,
) -> Float[Tensor, ""]:
    """`next_token_loss` and `divergence` of what an unembedding makes of hidden states, in nats.

    Can be differentiated once, in the hidden states and in all that the unembedding has to train.

    Args:
        hidden: the student's last hidden states.
        head: its unembedding.
        targets: what next tokens should be.
        teacher_head: the teacher's unembedding.
        kl_weight: of the divergence, from 0 to 1; the cross-entropy with the text has the rest.
        vocabulary: tokens, in order, between which alone both distributions choose, so that no others' logits are made;
            a label that is none of them does not count. By default all tokens.
    """
    labels = targets.labels.roll(-1, 1)
    labels[:, -1] = NO_LABEL
    if vocabulary is not None:
        labels = _among(labels, vocabulary.to(labels.device))
    teacher = None
    if targets.teacher_states is not None and teacher_head is not None:
        teacher = _Teacher(targets.teacher_states.flatten(0, 1), _Head(teacher_head, vocabulary))
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    differentiate, student = torch.is_grad_enabled(), _Head(head, vocabulary)
    return _ReadOut.apply(student, labels.flatten(), teacher, kl_weight, differentiate, hidden.flatten(0, 1), *trained)


def _among(labels: Int[Tensor, "B T"], vocabulary: Int[Tensor, " v"]) -> Int[Tensor, "B T"]:
    """Their numbers in a vocabulary, -100 where they are not in it."""
    places = torch.searchsorted(vocabulary, labels).clamp(max=len(vocabulary) - 1)
    return torch.where(vocabulary[places] == labels, places, NO_LABEL)


class _Head(NamedTuple):
    """An unembedding of some tokens."""

    module: nn.Module
    vocabulary: Int[Tensor, " v"] | None
    """Which, in order; None for all."""

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        module = self.module
        if self.vocabulary is None:
            return module(x)
        some = self.vocabulary.to(x.device)
        if not _is_plain(module):
            return module(x)[:, some]
        return linear(x, module.weight[some], None if module.bias is None else module.bias[some])

    def tensors(self) -> Iterator[Tensor]:
        """Its weights; few bits are buffers."""
        return chain(self.module.parameters(), self.module.buffers())


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether what it gives is its matrix's alone: no hooks, no adapters, and no weights of few bits or elsewhere."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.device.type != "meta"
        and not (head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"))
    )


class _Teacher(NamedTuple):
    states: Float[Tensor, "N D"]
    head: _Head

    def logits(self, rows: slice) -> Float[Tensor, "n vocabulary"]:
        """Made where the head is, as a copy of the student may be on another GPU."""
        weights = next(self.head.tensors(), self.states)
        return self.head(self.states[rows].to(weights.device)).to(self.states.device)


class _ReadOut(torch.autograd.Function):
    """The loss with its derivatives at once, some rows at a time."""

    @staticmethod
    def forward(
        ctx,
        head: _Head,
        labels: Int[Tensor, " N"],
        teacher: _Teacher | None,
        kl_weight: float,
        differentiate: bool,
        hidden: Float[Tensor, "N d"],
        *trained: Tensor,
    ) -> Float[Tensor, ""]:
        N, inputs = len(hidden), (hidden, *trained)
        count = (labels != NO_LABEL).sum().clamp(min=1)
        weights = torch.where(labels == NO_LABEL, 0.0, (1 - kl_weight) * N / count)
        total = hidden.new_zeros((), dtype=torch.float32)
        needed = enumerate(ctx.needs_input_grad[-len(inputs) :])
        found = {
            i: torch.zeros_like(inputs[i], dtype=torch.float32)
            for i, is_needed in needed
            if is_needed and differentiate
        }
        for rows in pieces(N, at_once(hidden).rows):
            x = hidden[rows].detach().requires_grad_(0 in found)
            with torch.set_grad_enabled(differentiate):
                logits = head(x)
            truth = None if teacher is None else teacher.logits(rows)
            loss, derivative = _differentiate(logits.detach(), truth, labels[rows], weights[rows], kl_weight)
            total += loss
            if found:
                gradients = torch.autograd.grad(logits, [(x, *trained)[i] for i in found], derivative)
                for (i, of_all), gradient in zip(found.items(), gradients, strict=True):
                    (of_all if i else of_all[rows]).add_(gradient, alpha=len(x) / N)
        ctx.save_for_backward(*(found.get(i) for i in range(len(inputs))))
        ctx.dtypes = [x.dtype for x in inputs]
        return total / N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Float[Tensor, ""]):
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *[None] * 5, *(None if x is None else (x * d_loss).to(dtype) for x, dtype in found)


def _differentiate(
    logits: Float[Tensor, "n vocabulary"],
    truth: Float[Tensor, "n vocabulary"] | None,
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    kl_weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n vocabulary"]]:
    """The sum of the rows' losses, and the derivative of their mean, which numbers of 16 bits can hold.

    Args:
        logits: the student's.
        truth: the teacher's logits, if there is one.
        labels: the token after each; -100 where there is none.
        weights: of each row's cross-entropy.
        kl_weight: of the divergence, in each row.
    """
    labels = labels.masked_fill(labels == NO_LABEL, 0)
    if next_token.takes(logits, truth):
        return next_token.losses_and_derivatives(logits, truth, labels, weights, kl_weight)
    total, derivatives = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
    labels = labels[:, None]
    for rows in pieces(len(logits), at_once(logits).elements // logits.shape[1]):
        log_q, label, weight = log_softmax(logits[rows].float(), -1), labels[rows], weights[rows, None]
        # Not a product alone: of a token that cannot be, 0 times infinity.
        total -= torch.where(weight > 0, log_q.gather(1, label) * weight, 0.0).sum()
        if truth is None:
            derivative = log_q.exp_().mul_(weight)
        else:
            log_p = log_softmax(truth[rows].float(), -1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum().mul_(kl_weight)
            derivative = log_q.exp_().mul_(weight + kl_weight).sub_(p.mul_(kl_weight))
        derivatives[rows] = derivative.scatter_add_(1, label, -weight).div_(len(logits))
    return total, derivatives
