"""Losses over next tokens: cross-entropy with a text, divergence from a teacher.

`read_out_loss` makes both of hidden states, some thousand tokens' logits never being there at once: of a vocabulary of
49,152 they are 200 kB a token, and of a step of 2,048 tokens, teacher's, student's and their derivatives, gigabytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

from fastweights.layers.linear import linear
from fastweights.layers.next_token_gradient import NO_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int
    from torch import Tensor

_LOGITS = 1 << 24
"""That are made at once of hidden states: enough rows for a product to be worth reading the unembedding for."""
_ELEMENTS = 1 << 18
"""Logits that are made distributions of at once: one megabyte in fp32, so that a second-level cache holds them."""


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
    student, teacher = student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)
    total = student.new_zeros((), dtype=torch.float32)
    for rows in _pieces(len(student), _ELEMENTS // student.shape[1]):
        q, p = (log_softmax(logits[rows].float(), -1) for logits in (student, teacher))
        total = total + (p.exp() * (p - q)).sum()
    return total / len(student)


class Targets(NamedTuple):
    """What next tokens should be."""

    labels: Int[Tensor, "B T"]
    """The tokens themselves; -100 where one does not count."""
    teacher_states: Float[Tensor, "B T D"] | None = None
    """The teacher's last hidden states, those that its unembedding reads."""


def read_out_loss(
    hidden: Float[Tensor, "B T d"],
    head: nn.Linear,
    targets: Targets,
    *,
    teacher_head: nn.Module | None = None,
    kl_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """`next_token_loss` and `divergence` of what an unembedding makes of hidden states, in nats.

    Products have autocast's type where that is on. Can be differentiated once.

    Args:
        hidden: the student's last hidden states.
        head: its unembedding.
        targets: what next tokens should be.
        teacher_head: the teacher's unembedding.
        kl_weight: of the divergence, from 0 to 1; the cross-entropy with the text has the rest.
    """
    labels = targets.labels.roll(-1, 1)
    labels[:, -1] = NO_LABEL
    teacher = None if targets.teacher_states is None else targets.teacher_states.flatten(0, 1)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _ReadOut.apply(
        hidden.flatten(0, 1), head.weight, head.bias, labels.flatten(), teacher, teacher_head, kl_weight, dtype
    )


class _ReadOut(torch.autograd.Function):
    """The loss with its derivatives at once, some rows at a time.

    They are kept times the number of rows until the end, as numbers of 16 bits end at 6e-8.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Float[Tensor, "N d"],
        weight: Float[Tensor, "vocabulary d"],
        bias: Float[Tensor, " vocabulary"] | None,
        labels: Int[Tensor, " N"],
        teacher_states: Float[Tensor, "N D"] | None,
        teacher_head: nn.Module | None,
        kl_weight: float,
        dtype: torch.dtype,
    ) -> Float[Tensor, ""]:
        N, vocabulary = len(hidden), len(weight)
        count = (labels != NO_LABEL).sum().clamp(min=1)
        weights = torch.where(labels == NO_LABEL, 0.0, (1 - kl_weight) * N / count)[:, None]
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        factors, biases = weight.to(dtype), None if bias is None else bias.to(dtype)
        for rows in _pieces(N, _LOGITS // vocabulary):
            x = hidden[rows].to(dtype)
            teacher = None
            if teacher_states is not None and teacher_head is not None:
                teacher = _read_out(teacher_states[rows], teacher_head)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = linear(x, factors, biases)
                total += _differentiate(logits, teacher, labels[rows], weights[rows], kl_weight)
                d_hidden[rows] = linear(logits, factors.t())
                if d_weight is not None:
                    d_weight += linear(logits.t(), x.t())
                if d_bias is not None:
                    d_bias += logits.sum(0, dtype=torch.float32)
        parts = (d_hidden, d_weight, d_bias)
        ctx.save_for_backward(*(None if part is None else part.div_(N) for part in parts))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total / N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Float[Tensor, ""]):
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if part is None else (part * d_loss).to(dtype) for part, dtype in parts), *[None] * 5


def _read_out(hidden: Tensor, head: nn.Module) -> Tensor:
    """On the head's device, which a copy of the model may not be on."""
    return head(hidden.to(next(head.parameters()).device)).to(hidden.device)


def _differentiate(
    logits: Float[Tensor, "N vocabulary"],
    teacher: Float[Tensor, "N vocabulary"] | None,
    labels: Int[Tensor, " N"],
    weights: Float[Tensor, "N 1"],
    kl_weight: float,
) -> Float[Tensor, ""]:
    """The sum of the rows' losses; their derivatives take the place of the logits.

    Args:
        logits: the student's.
        teacher: the teacher's, if there is one.
        labels: the token after each; its cross-entropy counts by the row's weight.
        weights: of each row.
        kl_weight: of the divergence, in each row.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    labels = labels.clamp(min=0)[:, None]
    for rows in _pieces(len(logits), _ELEMENTS // logits.shape[1]):
        log_q, label, weight = log_softmax(logits[rows].float(), -1), labels[rows], weights[rows]
        total -= (log_q.gather(1, label) * weight).sum()
        if teacher is None:
            derivative = log_q.exp_().mul_(weight)
        else:
            log_p = log_softmax(teacher[rows].float(), -1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum().mul_(kl_weight)
            derivative = log_q.exp_().mul_(weight + kl_weight).sub_(p.mul_(kl_weight))
        logits[rows] = derivative.scatter_add_(1, label, -weight)
    return total


def _pieces(length: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, length, size))
