"""Gradient of next-token losses with respect to what the unembedding is given, as a forward computation.

Written out, so that plain backpropagation through it gives the second-order terms of meta-learning; a few positions at
a time, so that the logits of a whole text are never held.

Notation: B batch, T time, d width of the model, V vocabulary, U the unembedding (V, d).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastweights.layers.linear import linear
from fastweights.layers.quantised import Int8Linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Unembedding: TypeAlias = nn.Linear | Int8Linear
NO_LABEL = -100
"""Label of a position whose next token is not predicted, as in all of transformers."""
# Logits in memory at once, 8 MB of fp32; but of so many positions at least, as each piece reads the unembedding twice.
_LOGITS, _POSITIONS = 2**21, 64


def next_token_gradient(
    hidden: Float[Tensor, "B T d"], labels: Int[Tensor, "B T"], unembedding: Unembedding, vocabulary: int = 0
) -> Float[Tensor, "B T d"]:
    """Gradient of each position's cross-entropy with respect to its hidden state; 0 where the label is -100.

    Uᵀ (softmax(U y) - onehot), a few positions at a time, with their logits computed again in the backward pass: the
    logits of a whole text are never held.

    Args:
        hidden: what the unembedding is given.
        labels: the next tokens.
        unembedding: U; one of eight bits for few positions, and without derivatives.
        vocabulary: the softmax is over the first so many tokens and the position's own label; 0 for all tokens.
    """
    classes = vocabulary if 0 < vocabulary < unembedding.out_features else unembedding.out_features
    chunk = max(_POSITIONS, _LOGITS // max(1, classes))
    flat, flat_labels = hidden.flatten(0, 1), labels.flatten()
    if isinstance(unembedding, Int8Linear):
        return _gradient_by_eight_bits(flat, flat_labels, unembedding, classes).view_as(hidden)
    parts = []
    for start in range(0, len(flat), chunk):
        arguments = (
            flat[start : start + chunk],
            flat_labels[start : start + chunk],
            unembedding.weight,
            unembedding.bias,
            classes,
        )
        if torch.is_grad_enabled() and hidden.requires_grad:
            part = checkpoint(_gradient, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _gradient(*arguments)
        parts.append(part)
    return torch.cat(parts).view_as(hidden) if parts else hidden


def _gradient(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, classes: int) -> Tensor:
    place = hidden.device
    hidden, labels = hidden.to(weight.device), labels.to(weight.device)  # of a model on several GPUs
    known, labels = labels != NO_LABEL, labels.clamp(min=0)
    if classes == len(weight):
        logits, own = linear(hidden.to(weight.dtype), weight, bias), None
    else:
        own = weight[labels]
        logits = _logits_of_some(hidden.to(weight.dtype), labels, own, weight, bias, classes)
    error = logits.to(hidden.dtype).softmax(-1)
    error = error.scatter_add(-1, labels.clamp(max=classes)[:, None], -torch.ones_like(error[:, :1]))
    gradient = linear(error[:, :classes].to(weight.dtype), weight[:classes].t()).to(hidden.dtype)
    if own is not None:
        gradient = gradient + error[:, classes:] * own
    return gradient.masked_fill(~known[:, None], 0.0).to(place)


def _gradient_by_eight_bits(hidden: Tensor, labels: Tensor, unembedding: Int8Linear, classes: int) -> Tensor:
    """By few positions' kernels; those without a label cost nothing."""
    known = labels != NO_LABEL
    own = labels[known][:, None]
    # Not by calling it: hooks, such as those that fetch it and send it away again, are for what the model says.
    logits = unembedding.few(hidden[known].float())
    logits = logits if unembedding.bias is None else logits + unembedding.bias
    if classes < unembedding.out_features:
        of_own = logits.gather(-1, own)
        logits[:, classes:] = -torch.inf
        logits.scatter_(-1, own, of_own)
    error = logits.softmax(-1)
    error.scatter_add_(-1, own, -torch.ones_like(error[:, :1]))
    gradient = torch.zeros_like(hidden)
    gradient[known] = unembedding.few_transposed(error).to(hidden.dtype)
    return gradient


def _logits_of_some(
    hidden: Tensor, labels: Tensor, own: Tensor, weight: Tensor, bias: Tensor | None, classes: int
) -> Tensor:
    """Of the first `classes` tokens, then of each position's label, -inf where it is one of these."""
    logits = linear(hidden, weight[:classes], None if bias is None else bias[:classes])
    last = (hidden * own).sum(-1)
    last = last if bias is None else last + bias[labels]
    return torch.cat((logits, last.masked_fill(labels < classes, -torch.inf)[:, None]), -1)
