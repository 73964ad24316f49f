"""Distributions over next tokens, made of logits a few rows at a time, and how far two of them are from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import cross_entropy, log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int
    from torch import Tensor


class AtOnce(NamedTuple):
    """How much is made at once."""

    rows: int
    """Tokens whose logits are there: enough for their product to be worth reading the unembedding for."""
    elements: int
    """Logits that are made distributions of."""


ON_CPU = AtOnce(rows=512, elements=1 << 18)
"""One megabyte of distributions in fp32, so that a second-level cache holds them."""
ON_GPU = AtOnce(rows=4096, elements=1 << 26)
"""A quarter of a gigabyte: a launch for every few rows would take longer than what it computes."""


def at_once(x: Tensor) -> AtOnce:
    """Where a tensor is."""
    return ON_CPU if x.is_cpu else ON_GPU


def pieces(length: int, size: int) -> Iterator[slice]:
    """Of so many rows, so many at a time, and at least one."""
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, length, size))


def token_losses(logits: Float[Tensor, "N vocabulary"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Cross-entropy of each position with its token, in nats and fp32."""
    slices = pieces(len(logits), at_once(logits).elements // logits.shape[1])
    return torch.cat([cross_entropy(logits[rows].float(), labels[rows], reduction="none") for rows in slices])


def token_divergences(
    logits: Float[Tensor, "N vocabulary"], original: Float[Tensor, "N vocabulary"]
) -> Float[Tensor, " N"]:
    """KL(original || other) of each position, in nats and fp32.

    Args:
        logits: the other's.
        original: those of the original.
    """
    found = []
    for rows in pieces(len(logits), at_once(logits).elements // logits.shape[1]):
        q, p = (log_softmax(x[rows].float(), -1) for x in (logits, original))
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)
